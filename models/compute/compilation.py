"""Decide once whether torch.compile is available here and repays itself, with the reason in one line."""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

COMPILE_WORTH_FLOPS = 1e13  # compiling takes about a minute of two cores; this much work takes several eagerly

COMPILED = "compiled with torch.compile"

HEADERS = "Python.h"

GRAPHS = 64  # of one function in one process


def missing(device: torch.device) -> dict[str, str]:
    """Return what inductor lacks to build code for the device, each with Debian's package; empty: nothing.

    For the CPU it calls $CXX or g++, and no other compiler; for CUDA triton builds its launchers with $CC, gcc or
    clang. Both include Python.h, without which they fail only once the first graph is built.
    """
    if device.type == "cuda":
        commands = [os.environ.get("CC", ""), "gcc", "clang"]
        lacking = {} if any(shutil.which(command) for command in commands if command) else {"C compiler": "gcc"}
    else:
        command = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++").split()
        lacking = {} if command and shutil.which(command[0]) else {"C++ compiler": "g++"}
    paths = {sysconfig.get_path("include"), sysconfig.get_path("include", scheme="posix_prefix")}
    if not any(Path(path, HEADERS).is_file() for path in paths):
        lacking[HEADERS] = "python3-dev"
    return lacking


def has_compiler(device: torch.device) -> bool:
    """Return whether inductor can build code for the device."""
    return not missing(device)


def should_compile(mode: str, flops: float, device: torch.device, key: str = "inner.compile") -> tuple[bool, str]:
    """(compile?, why) for `auto`, `on` or `off`. Raises ValueError, naming the config's key, if `on` cannot be had."""
    if mode == "off":
        return False, "eager: compile=off"
    if lacking := missing(device):
        what, packages = " and ".join(lacking), " ".join(lacking.values())
        if mode == "on":
            raise ValueError(f"{key}=on needs {what}: apt-get install {packages} (Debian), or set {key}=auto")
        return False, f"eager: no {what} found (Debian: apt-get install {packages})"
    if mode == "auto" and flops < COMPILE_WORTH_FLOPS:
        return False, f"eager: {flops:.1e} FLOPs are too little work to compile for"
    return True, COMPILED


def announced(why: str) -> str:
    """Return what to log before the work, for a reason of should_compile: nothing else is logged while it compiles."""
    if not why.startswith(COMPILED):
        return why
    return f"compiling with torch.compile{why.removeprefix(COMPILED)}: before the first step, about a minute or two"


@cache
def compiled(function: Callable[..., Any], device: str, one_core: bool = False) -> Callable[..., Any]:
    """The function under torch.compile, one graph for every shape; one_core: for threads that have one core each.

    On a CPU the graph is called from C++, which lets go of Python's lock: threads can run it side by side. On CUDA
    matmuls are tuned with what follows them as their epilogue, so that sines may read the float32 accumulator.
    """
    # Every field shape and precision is a graph of its own; beyond torch's limit of 8 a full graph is refused.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    options: dict[str, Any] = {"cpp_wrapper": True} if device == "cpu" else {"max_autotune": True}
    if one_core:
        options["cpp.threads"] = 1
    return torch.compile(function, dynamic=False, fullgraph=True, options=options)
