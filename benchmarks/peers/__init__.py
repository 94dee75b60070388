"""The engine benchmark's contestants, each a process of its own, and the work that they share.

Libraries look for a package named `kernels` and import it if they can; on these processes' path that would be a script
of ours.
"""

import sys

sys.modules["kernels"] = None  # type: ignore[assignment]
