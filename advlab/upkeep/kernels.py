"""The kernel that notebooks run in: of this Python, and with none of the user's own settings."""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec

from advlab import files

# Meant for other programs, these would change what a notebook shows, or end it.
CLEARED = dict.fromkeys(["PYTHONWARNINGS", "PYTHONOPTIMIZE", "PYTHONSTARTUP"], "")
SETTINGS = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", **CLEARED}
LONGEST = 70  # bytes of a folder below which sockets lie: their own paths may have some 100


class OwnKernel(AsyncKernelManager):
    """A kernel of this Python, whatever a user has made of the name "python3".

    Attributes:
        words: What stands before the command.
    """

    words: Sequence[str] = ()

    @property
    def kernel_spec(self) -> KernelSpec:
        """What is started, with IPython's settings in a new folder beside the connection file."""
        own = Path(self.connection_file).parent
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        env = SETTINGS | {"IPYTHONDIR": str(own / "ipython")}
        # Torch's threads that wait for work would keep the cores from other kernels.
        env["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")
        if files.user_home() is None:
            env["HOME"] = str(own)  # IPython does not start without
        return KernelSpec(
            argv=[*self.words, *command],
            env=env,
            display_name="advlab",
            language="python",
        )

    async def _async_interrupt_kernel(self) -> None:
        # Not at the end of a notebook: the kernel may be all but idle, and would print an error.
        if not self.shutting_down:
            await super()._async_interrupt_kernel()


def short_folder(usual: str | None = None) -> str:
    """Return a folder for temporary files, or /tmp where its path is too long for sockets.

    Args:
        usual: The folder; None for the system's.
    """
    usual = usual or tempfile.gettempdir()
    return "/tmp" if os.name == "posix" and len(os.fsencode(usual)) > LONGEST else usual
