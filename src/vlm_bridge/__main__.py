"""``python -m vlm_bridge`` is ``vlm-bridge``."""

from vlm_bridge.cli.main import run_bridge

if __name__ == "__main__":
    run_bridge()
