import copy, sys, traceback, warnings
sys.path.insert(0, "tests")
import torch
from tiny_models import batch, build
from hf_fused_head.patches import apply_patch, patch_report, last_stats
from hf_fused_head.patches.deferred import DeferredLogits
warnings.simplefilter("ignore")
def cuda(i): return {k: v.cuda() if torch.is_tensor(v) else v for k, v in i.items()}
def grads(m): return [p.grad.float().cpu() for p in m.parameters() if p.grad is not None]
def case(name, f):
    try: print("OK", name, f(), flush=True)
    except Exception as e: print("FAIL", name, type(e).__name__, str(e)[:300], flush=True); traceback.print_exc(limit=-3)
def train(impl, dtype, fam="gemma2", **kw):
    def f():
        s = build(fam, hidden_size=64, head_dim=32, vocab_size=1003, **kw).to("cuda", dtype); m = apply_patch(copy.deepcopy(s), impl=impl, stats=("accuracy","entropy"))
        i = cuda(batch(s, length=40)); a = m(**i); b = s(**i); a.loss.backward(); b.loss.backward()
        d = max((x - y).abs().max().item() for x, y in zip(grads(m), grads(s)))
        return a.loss.item(), b.loss.item(), d, torch.equal(a.logits, b.logits), patch_report(m).kernel[:30], last_stats(m).num_valid.item()
    return f
for impl in ("torch", "triton", "auto"):
    for dtype in (torch.float32, torch.bfloat16): case(f"{impl} {dtype}", train(impl, dtype))
def labels_on_cpu():
    s = build("llama").cuda(); m = apply_patch(copy.deepcopy(s), impl="torch"); i = batch(s); i["input_ids"] = i["input_ids"].cuda()
    return m(**i).loss.item(), s(**i).loss.item()
case("labels on cpu", labels_on_cpu)
def device_map():
    from accelerate import dispatch_model
    s = build("gemma2", tie_word_embeddings=False); o = []
    for patch in (0, 1, 2):
        m = copy.deepcopy(s)
        if patch == 1: apply_patch(m, impl="torch")
        m = dispatch_model(m, {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": 0}, main_device="cuda:0", force_hooks=True)
        if patch == 2: apply_patch(m, impl="torch")
        r = m(**batch(s)); o.append((r.loss.item(), str(r.loss.device), type(r.logits).__name__, str(r.logits.device), r.logits.sum().item()))
        with torch.no_grad(): r = m(**batch(s)); o.append(r.logits.sum().item())
    return o
case("device_map", device_map)
def autocast(dtype):
    def f():
        s = build("llama").cuda(); m = apply_patch(copy.deepcopy(s)); i = cuda(batch(s))
        with torch.autocast("cuda", dtype): a = m(**i); b = s(**i)
        a.loss.backward(); b.loss.backward()
        return a.loss.item(), b.loss.item(), a.logits.dtype, torch.equal(a.logits, b.logits), max((x - y).abs().max().item() for x, y in zip(grads(m), grads(s)))
    return f
case("autocast bf16", autocast(torch.bfloat16)); case("autocast fp16", autocast(torch.float16))
def comp():
    s = build("gemma2", num_hidden_layers=1).cuda(); m = apply_patch(copy.deepcopy(s)); c = torch.compile(m, fullgraph=True); o = []
    for L in (9, 12, 15): i = cuda(batch(s, length=L)); r = c(**i); r.loss.backward(); o.append((r.loss.item(), s(**i).loss.item()))
    return o
case("compile inductor", comp)
