"""`vlm-bridge demo`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import typer

from vlm_bridge import __version__
from vlm_bridge.errors import UsageError


def demo(
    checkpoint: Path = typer.Option(
        None,
        "--checkpoint",
        help="A checkpoint, or the folder of a training run. (default: the bundled captioner)",
    ),
    host: str = typer.Option("127.0.0.1", help="Address to serve on; 0.0.0.0 lets the network in."),
    port: int = typer.Option(7860, min=0, max=65535, help="Port to serve on; 0 takes a free one."),
    run: Path = typer.Option(None, "--run", help="A training run to show live in the second tab."),
    device: str = typer.Option("auto", help="auto, cpu, cuda, cuda:1, mps."),
) -> None:
    """Serve a page that captions pictures and shows a training run live, and a JSON endpoint (/api/caption)."""
    if find_spec("gradio") is None:
        raise UsageError("the demo page needs gradio: pip install 'vlm-bridge[demo]'")
    from vlm_bridge.cli.quiet import quiet_transformers, without_garbage_collection

    with without_garbage_collection():
        from vlm_bridge.captioning.pipeline import Captioner
        from vlm_bridge.data_pipeline.isolated import ImageReader
        from vlm_bridge.demo.server import Demo, serve
        from vlm_bridge.demo.service import DECODE_TOGETHER, CaptionService
        from vlm_bridge.quickstart import real_photographs

        quiet_transformers()
        captioner = Captioner.from_pretrained(checkpoint, device)
    name = str(checkpoint) if checkpoint is not None else f"bundled with vlm-bridge {__version__}"
    service = CaptionService(captioner, name, ImageReader(DECODE_TOGETHER))
    serve(Demo(service, host, port, run=run, examples=real_photographs()))
