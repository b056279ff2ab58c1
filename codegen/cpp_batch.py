"""Compile the C++ kernels of a graph in few runs of the compiler.

TorchInductor gives each kernel a file of its own. Nearly all of the half second that g++ takes for one is spent on reading
headers and on linking, so that the nine kernels of a transformer take 2.5 s on two cores, and one file with all of them 0.8 s on
one. Inside `batched` a generated module's kernels are collected, and compiled together when the module waits for the first of
them: the same sources with the same flags, each in a namespace of its own. What is not plain enough for that, and everything if the
compiler refuses the batch, goes TorchInductor's own way.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch

from effcompile.core.processor import marked

_PREFIX = re.compile(r'\A\s*(#include [<"][^\n]*[>"])[^\n]*\n')
_ENTRY = re.compile(r'extern "C"\s+void\s+kernel\(')
_DIRECTIVE = re.compile(r"^\s*#\s*(?!pragma\b)", re.MULTILINE)
_ATTRIBUTE = "_eff_batch"
_LEAST = 8  # kernels in a file, before a second file and core are worth their headers


@contextmanager
def batched() -> Iterator[None]:
    """Compile the kernels of each module that TorchInductor loads inside together."""
    from torch._inductor import async_compile

    original = async_compile.AsyncCompile.cpp_pybinding

    def cpp_pybinding(compiler: Any, argtypes: list[str], source_code: str) -> Any:
        source_code = marked(source_code)
        parts = _split(source_code)
        if parts is None or async_compile.get_compile_threads() <= 1:
            return original(compiler, argtypes, source_code)
        batch = compiler.__dict__.setdefault(_ATTRIBUTE, _Batch(compiler.submit))
        future = batch.add(parts, argtypes, lambda: original(compiler, argtypes, source_code))
        return async_compile.LambdaFuture(future)

    with mock.patch.object(async_compile.AsyncCompile, "cpp_pybinding", cpp_pybinding):
        yield


def _split(source: str) -> tuple[str, str] | None:
    """Return the include line and the body of a kernel; None where the body has more than a function in it."""
    head = _PREFIX.match(source)
    if head is None:
        return None
    body = source[head.end() :]
    plain = len(_ENTRY.findall(body)) == body.count('extern "C"') == len(re.findall(r"\bkernel\b", body)) == 1
    return (head.group(1), body) if plain and not _DIRECTIVE.search(body) else None


class _Batch:
    """Hold the kernels of one module, and compile them when the first is asked for."""

    def __init__(self, submit: Callable[..., Any]) -> None:
        self._submit = submit
        self._kernels: list[tuple[tuple[str, str], list[str]]] = []
        self._made: list[Callable[..., Any]] | None = None

    def add(
        self, parts: tuple[str, str], argtypes: list[str], alone: Callable[[], Any]
    ) -> Callable[[], Callable[..., Any]]:
        """Return what gives the kernel's Python function; `alone` compiles it in TorchInductor's own way."""
        number = len(self._kernels)
        self._kernels.append((parts, argtypes))

        def result() -> Any:
            if self._made is None:
                self._made = self._compile()
            return self._made[number] if number < len(self._made) else alone().result()

        return result

    def _compile(self) -> list[Callable[..., Any]]:
        heads = {head for (head, _), _ in self._kernels}
        if len(self._kernels) < 2 or len(heads) != 1:
            return []
        try:
            return _compiled(heads.pop(), [(body, argtypes) for (_, body), argtypes in self._kernels], self._submit)
        except Exception as error:
            torch._logging.getArtifactLogger(__name__, "output_code").debug("kernels are compiled alone: %s", error)
            return []


def _compiled(
    head: str, kernels: Sequence[tuple[str, Sequence[str]]], submit: Callable[..., Any]
) -> list[Callable[..., Any]]:
    """Return the Python functions of all kernels, from as many files as keep the compile threads busy."""
    from torch._inductor.async_compile import get_compile_threads

    files = max(1, min(get_compile_threads(), len(kernels) // _LEAST))
    edges = [len(kernels) * number // files for number in range(files + 1)]
    begun = [_begun(head, kernels[a:b], submit) for a, b in itertools.pairwise(edges)]
    return [function for library in begun for function in library().functions]


def _begun(head: str, kernels: Sequence[tuple[str, Sequence[str]]], submit: Callable[..., Any]) -> Callable[[], Any]:
    """Begin to compile one file, and return what waits for its library."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Bindings

    class Together(Bindings):  # type: ignore[misc]
        cache: ClassVar[dict[str, Any]] = {}  # its libraries have several entry points, TorchInductor's have one

        @classmethod
        def _load_library_inner(cls, path: str, key: str) -> Any:
            return SimpleNamespace(functions=[_function(path, key, number) for number in range(len(kernels))])

    template = Bindings.suffix_template
    includes = re.findall(r"^#include <.*>$", template, re.MULTILINE)
    parts = [head, "#define PY_SSIZE_T_CLEAN", *includes]
    for number, (body, argtypes) in enumerate(kernels):
        operands = ", ".join(f"parse_arg<{kind.replace('const ', '')}>(args, {n})" for n, kind in enumerate(argtypes))
        suffix = template.format(
            arg_len=len(argtypes),
            call_entry_func=Bindings.call_entry_function.format(operands),
            entry_func=_name(number),
            extra_parse_arg="",
        )
        parts += [f"namespace eff_{number} {{", _ENTRY.sub("static void kernel(", body), suffix, "}"]
    library: Callable[[], Any] = Together.load_async("\n".join(parts), submit_fn=submit)
    return library


def _name(number: int) -> str:
    return f"kernel_{number}"


def _function(path: str, key: str, number: int) -> Callable[..., Any]:
    address = torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr  # type: ignore[attr-defined]
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(address)
    spec = importlib.util.spec_from_file_location(f"{key}.{_name(number)}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, _name(number))
    return function
