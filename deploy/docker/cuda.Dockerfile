# docker build -f deploy/docker/cuda.Dockerfile -t bert-glue:cuda .
# docker run --rm --gpus all --shm-size 2g -v "$PWD/output:/output" bert-glue:cuda doctor
# torch's wheel contains CUDA's libraries. The machine needs only the driver and its container toolkit.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
WORKDIR /opt/bert-glue
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
COPY pyproject.toml README.md LICENSE run_glue.py config.json bert_base_cased_config.json ./
COPY bert_glue/ bert_glue/
COPY configs/ configs/
COPY test/ test/
# Editable, because recipes and launchers are beside the package.
RUN pip install --no-cache-dir --no-deps --editable . \
    && useradd --create-home --uid 1000 user && mkdir /output && chown user /output
USER user
ENV PYTHONUNBUFFERED=1 HF_HOME=/home/user/.cache/huggingface \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENTRYPOINT ["bert-glue"]
CMD ["doctor"]
