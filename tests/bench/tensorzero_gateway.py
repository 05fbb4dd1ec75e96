"""Holds tensorzero's gateway open: `tensorzero_gateway.py SETTINGS ADDRESS`, run where tensorzero is installed.

Its Python package starts the gateway inside the process, on a port of its own choice, which is written to the file
ADDRESS once it is open. The package says that this way of starting it will go; what is measured is the gateway.
"""

from __future__ import annotations

import signal
import sys
import warnings
from importlib import import_module
from pathlib import Path


def main() -> None:
    openai, tensorzero = import_module("openai"), import_module("tensorzero")  # not in our own environment
    settings, address = sys.argv[1:]
    warnings.simplefilter("ignore")
    client = openai.OpenAI(api_key="unused")
    client = tensorzero.patch_openai_client(client, config_file=settings, async_setup=False)
    partial = Path(address).with_suffix(".partial")
    partial.write_text(str(client.base_url))
    partial.rename(address)
    signal.pause()


if __name__ == "__main__":
    main()
