"""Whether torch.compile repays itself here, decided once and said in one line."""

import shutil

import torch

COMPILE_WORTH_FLOPS = 1e13  # compiling takes about a minute of two cores; this much work takes several eagerly


def has_compiler(device: torch.device) -> bool:
    """Whether inductor can build code for the device: triton for CUDA, a C++ compiler for the CPU."""
    if device.type == "cuda":
        return True
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def should_compile(mode: str, flops: float, device: torch.device) -> tuple[bool, str]:
    """(compile?, why) for `auto`, `on` or `off`. Raises ValueError if `on` cannot be had."""
    if mode == "off":
        return False, "eager: compile=off"
    if not has_compiler(device):
        if mode == "on":
            raise ValueError("inner.compile=on needs a C++ compiler: install g++, or set inner.compile=auto")
        return False, "eager: no C++ compiler found (Debian: apt-get install g++)"
    if mode == "auto" and flops < COMPILE_WORTH_FLOPS:
        return False, f"eager: {flops:.1e} FLOPs are done sooner than compiled"
    return True, "compiled with torch.compile"
