# docker build -f containers/cpu.Dockerfile -t widemargin:cpu .
# docker run --rm -v "$PWD:/work" widemargin:cpu quickstart
FROM python:3.12-slim

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY kernels kernels
COPY trainer trainer
COPY integrations integrations
COPY configs configs
RUN pip install --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu . \
    && useradd --create-home user

USER user
WORKDIR /work
ENTRYPOINT ["widemargin"]
CMD ["doctor"]
