"""What is particular to a host, a tool chain or a device. Import it as ``mla_patch.compat``.

Nothing is imported here: this file is read at interpreter start, and only the names of the
hosts' top packages are needed then.
"""

HOST_PACKAGES = ("sglang", "vllm")
