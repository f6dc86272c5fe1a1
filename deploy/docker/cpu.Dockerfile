# docker build -f deploy/docker/cpu.Dockerfile -t bert-glue:cpu .
# docker run --rm -v "$PWD/output:/output" bert-glue:cpu train --sample --task_name mrpc --do_train --do_eval --output_dir /output/mrpc
# TORCH_INDEX: address of an index with torch without CUDA, which saves some gigabytes. Default: pip's own index.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
ARG TORCH_INDEX=
WORKDIR /opt/bert-glue
COPY requirements.txt ./
RUN pip install --no-cache-dir ${TORCH_INDEX:+-i "${TORCH_INDEX}"} "$(grep '^torch==' requirements.txt)" \
    && pip install --no-cache-dir -r requirements.txt
COPY pyproject.toml README.md LICENSE run_glue.py config.json bert_base_cased_config.json ./
COPY bert_glue/ bert_glue/
COPY configs/ configs/
COPY test/ test/
# Editable, because recipes and launchers are beside the package.
RUN pip install --no-cache-dir --no-deps --editable . \
    && useradd --create-home --uid 1000 user && mkdir /output && chown user /output
USER user
ENV PYTHONUNBUFFERED=1 HF_HOME=/home/user/.cache/huggingface
ENTRYPOINT ["bert-glue"]
CMD ["doctor"]
