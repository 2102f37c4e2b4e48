"""On PYTHONPATH: let vLLM's V2 model runner start on a CPU, under Triton's interpreter.

vLLM chooses the V2 runner only if Triton has an active driver; a build for CPUs has none. Python
imports this file in every process before anything else, so each of vLLM's processes sees a driver.
"""

from types import SimpleNamespace

import triton.backends


class _ActiveDriver:
    @staticmethod
    def is_active() -> bool:
        return True


triton.backends.backends["cpu"] = SimpleNamespace(driver=_ActiveDriver, compiler=None)
