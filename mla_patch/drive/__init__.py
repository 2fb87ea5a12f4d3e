"""Drives real releases of engines, without a model. What the command line must know before it loads torch is here.

An engine has a folder here, such as `mla_patch.drive.sglang`. It adds its row to the tables below.
"""

# The dtypes that a person can name, and their names in torch.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}

# Attention backends of each engine for which `mla-patch warmup` knows the kernels.
WARM_BACKENDS = {"sglang": ("triton", "flashmla", "dsa", "dsv4")}
