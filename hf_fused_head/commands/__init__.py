"""The commands of `hf-fused-head`, one file each; `common.py` holds what they share.

Every module that needs torch is imported inside its command, so that `--help` starts at once.
"""
