"""On PYTHONPATH: let vLLM's V2 model runner start on a CPU, under Triton's interpreter.

vLLM chooses the V2 runner only if Triton has an active driver; a build for CPUs has none. Python
imports this file in every process before anything else, so each of vLLM's processes sees a driver.

vLLM's n-gram kernel combines masks into integers, which a GPU takes and the interpreter refuses
(triton 3.9.0): it gets booleans.
"""

from types import SimpleNamespace
from typing import Any

import triton.backends
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


class _ActiveDriver:
    @staticmethod
    def is_active() -> bool:
        return True


triton.backends.backends["cpu"] = SimpleNamespace(driver=_ActiveDriver, compiler=None)


_masked_load = InterpreterBuilder.create_masked_load


def _load(self: Any, ptrs: Any, mask: Any, *others: Any) -> Any:
    return _masked_load(self, ptrs, TensorHandle(mask.data.astype(bool), mask.dtype), *others)


InterpreterBuilder.create_masked_load = _load
