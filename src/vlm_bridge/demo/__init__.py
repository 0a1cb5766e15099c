"""A page that captions images, and a JSON endpoint. Needs the extra `demo`."""

import os

# Gradio would look for newer versions of itself, and keep a list of captions in browsers.
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
