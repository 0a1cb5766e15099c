# vlm-bridge on a CPU.
#   docker build --tag vlm-bridge .
#   docker run --rm --volume "$PWD/photos:/images:ro" vlm-bridge caption .
#   docker run --rm --publish 127.0.0.1:7860:7860 vlm-bridge    # the demo, on http://127.0.0.1:7860
FROM python:3.12-slim

# On Linux, PyPI's torch is the CUDA build of some gigabytes; this index has the small one.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 VLM_BRIDGE_CACHE=/opt/cache

WORKDIR /opt/vlm-bridge
COPY constraints.txt ./
RUN pip install --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY config config
COPY src src
RUN pip install --constraint constraints.txt ".[lite,demo]"
# The language model is converted now: containers start quicker, and need no cache of their own.
RUN vlm-bridge weights && python -c "import vlm_bridge; vlm_bridge.Captioner.from_pretrained()"

RUN useradd --create-home captioner
USER captioner
WORKDIR /images
EXPOSE 7860
ENTRYPOINT ["vlm-bridge"]
CMD ["demo", "--host", "0.0.0.0"]
