# The programs of sd_memguard with torch's default build, which has CUDA 13 on Linux.
#   docker build -t sd-memguard .
#   docker run --rm --gpus all -v "$PWD":/work sd-memguard train --pretrained MODEL --train_data_dir images --output_dir runs/mine
# For a smaller image without CUDA: docker build --build-arg TORCH_INDEX=<address of torch's CPU wheels> .
FROM python:3.12-slim

ARG TORCH_INDEX=""
WORKDIR /src
COPY pyproject.toml README.md LICENSE MANIFEST.in CHANGELOG.md CITATION.cff SECURITY.md ./
COPY sd_memguard sd_memguard
RUN if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir --index-url "$TORCH_INDEX" torch torchvision; fi \
    && pip install --no-cache-dir '.[all]' \
    && rm -rf /src

# An ordinary user, whose number docker's --user can change so that files on a mounted folder are yours.
RUN useradd --create-home trainer && mkdir /work && chown trainer /work
USER trainer
WORKDIR /work
ENTRYPOINT ["sd-memguard"]
CMD ["--help"]
