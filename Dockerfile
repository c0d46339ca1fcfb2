# An artifact (a folder that `vitral export` or `vitral optimize` wrote) behind HTTP: docs/deploy.md.
#
#   docker build -t vitral .
#   docker build -t vitral --build-arg ENGINE=openvino .     for an artifact of OpenVINO's form
#
# The image holds Vitral without torch; the model is mounted at /model, and a file of tokens at
# /run/secrets/token.

FROM python:3.12-slim AS build
ARG ENGINE=onnxruntime
WORKDIR /source
COPY constraints.txt deploy/requirements.txt ./
RUN pip install --no-cache-dir --prefix=/install --constraint constraints.txt --requirement requirements.txt "$ENGINE"
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --prefix=/install --no-deps .

FROM python:3.12-slim
COPY --from=build /install /usr/local
# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /tmp
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["vitral", "serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--token-file", "/run/secrets/token", "--grace", "30s"]
