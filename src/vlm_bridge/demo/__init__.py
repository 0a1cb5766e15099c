"""A page that captions images, and a JSON endpoint. Needs the extra `demo`."""

import os

# Gradio reads it at its import, and would look for newer versions of itself.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
