# docker build -f deploy/docker/npu.Dockerfile --build-arg BASE=ascendai/cann:VERSION-910b-ubuntu22.04-py3.11 -t bert-glue:npu .
# docker run --rm --device /dev/davinci0 --device /dev/davinci_manager --device /dev/devmm_svm --device /dev/hisi_hdc \
#   -v /usr/local/Ascend/driver:/usr/local/Ascend/driver:ro -v /usr/local/dcmi:/usr/local/dcmi:ro bert-glue:npu doctor
# BASE has no default. Its CANN must be a version for which the torch_npu of requirements/npu.txt was built, its chip must
# be that of the machine, and its Python must be 3.11 or later.
ARG BASE
FROM ${BASE}
WORKDIR /opt/bert-glue
COPY requirements.txt ./
COPY requirements/npu.txt requirements/npu.txt
RUN pip install --no-cache-dir -r requirements/npu.txt
COPY pyproject.toml README.md LICENSE run_glue.py config.json bert_base_cased_config.json ./
COPY bert_glue/ bert_glue/
COPY configs/ configs/
COPY test/ test/
COPY deploy/docker/npu_entry.sh deploy/docker/npu_entry.sh
# Editable, because recipes and launchers are beside the package. The user is root, because a group of the host decides
# who may use the device.
RUN pip install --no-cache-dir --no-deps --editable . && mkdir /output
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["bash", "deploy/docker/npu_entry.sh"]
CMD ["doctor"]
