# syntax=docker/dockerfile:1
# emo-serve in two images; the CUDA one is built unless told otherwise:
#   docker build -t emo-serve .
#   docker build -t emo-serve:cpu --target cpu .
# and run (CUDA: add --gpus all --ipc=host), here with the model that ships:
#   docker run --rm -p 127.0.0.1:8000:8000 emo-serve
# It listens on every interface of the container, so changing pools needs --admin-api-key KEY.

ARG VLLM_VERSION=0.32.0
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# -- the wheel, for both images --
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY emo_serve emo_serve
COPY kernels kernels
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

# -- CPU --
FROM ${PYTHON_IMAGE} AS cpu
# vLLM's CPU kernels link libnuma, torch finds libgomp, and torch.compile calls g++.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libgomp1 libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY requirements/cpu.lock /tmp/cpu.lock
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --no-deps --extra-index-url "${TORCH_INDEX}" -r /tmp/cpu.lock
COPY --from=wheel /dist /tmp/dist
RUN pip install --no-cache-dir --no-deps /tmp/dist/*.whl && rm -r /tmp/dist && emo-serve --version
RUN useradd --create-home --uid 10001 emo
USER emo
WORKDIR /home/emo
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["emo-serve", "serve", "--host", "0.0.0.0", "--port", "8000"]

# -- CUDA: vLLM's own image of the version this project is written for --
FROM vllm/vllm-openai:v${VLLM_VERSION} AS cuda
COPY --from=wheel /dist /tmp/dist
# scikit-learn: the classifier behind model "auto"
RUN python3 -m pip install --no-cache-dir --break-system-packages scikit-learn==1.9.1 \
    && python3 -m pip install --no-cache-dir --no-deps --break-system-packages /tmp/dist/*.whl \
    && rm -r /tmp/dist && emo-serve --version
RUN useradd --create-home --uid 10001 emo
USER emo
WORKDIR /home/emo
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=900s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["emo-serve", "serve", "--host", "0.0.0.0", "--port", "8000"]
