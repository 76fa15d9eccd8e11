"""Data and functions behind `hf-fused-head bench`: workloads, contenders, meters, reports."""
