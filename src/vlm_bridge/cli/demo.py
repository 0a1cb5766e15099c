"""`vlm-bridge demo`."""

from __future__ import annotations

import threading
from importlib.util import find_spec
from pathlib import Path

import typer

from vlm_bridge import __version__
from vlm_bridge.cli import options
from vlm_bridge.errors import UsageError


def demo(
    checkpoint: options.Checkpoint = None,
    host: str = typer.Option("127.0.0.1", help="Address to serve on; 0.0.0.0 lets the network in."),
    port: int = typer.Option(7860, min=0, max=65535, help="Port to serve on; 0 takes a free one."),
    run: Path = typer.Option(None, "--run", help="A training run to show live in the second tab."),
    device: options.Device = "auto",
) -> None:
    """Serve a page that captions images and shows a training run, and a JSON endpoint."""
    if find_spec("gradio") is None:
        raise UsageError("the demo page needs gradio: pip install 'vlm-bridge[demo]'")
    from vlm_bridge.cli.quiet import quiet_transformers, without_garbage_collection

    with without_garbage_collection():
        from vlm_bridge.captioning.pipeline import Captioner
        from vlm_bridge.data_pipeline.isolated import ImageReader
        from vlm_bridge.demo.server import serving
        from vlm_bridge.demo.service import DECODE_TOGETHER, CaptionService
        from vlm_bridge.quickstart import real_photographs

        quiet_transformers()
        captioner = Captioner.from_pretrained(checkpoint, device)
    name = str(checkpoint or f"bundled with vlm-bridge {__version__}")
    with ImageReader(DECODE_TOGETHER) as reader:
        service = CaptionService(captioner, name, reader.open_image)
        with serving(service, host, port, run=run, examples=real_photographs()) as address:
            print(f"serving on {address} (Ctrl-C stops)", flush=True)
            threading.Event().wait()
