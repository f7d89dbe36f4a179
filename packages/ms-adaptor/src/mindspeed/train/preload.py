"""Imported by the fork server, so that ranks start with torch and Megatron already loaded.

Anywhere else, importing this module does nothing: the launching process says so by an environment
variable, which it sets only for the fork server.
"""

from __future__ import annotations

import os

PRELOAD_VARIABLE = "MINDSPEED_TRAIN_PRELOAD"


def load() -> None:
    """Installs the device layer and imports what every rank needs; starts no thread."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from mindspeed import device

    device.install()

    import mindspeed.patching.apply
    import mindspeed.train.trainer  # noqa: F401


if os.environ.get(PRELOAD_VARIABLE) == "1":
    load()
