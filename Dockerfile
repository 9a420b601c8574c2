# Any model on an NVIDIA GPU: vLLM's official image plus this package, about 10 MB on top.
#   docker build -t steer-server .
#   docker run --gpus all -p 8000:8000 steer-server meta-llama/Llama-3.1-8B-Instruct
ARG VLLM_VERSION=v0.32.0
FROM vllm/vllm-openai:${VLLM_VERSION}

WORKDIR /opt/steer-server
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY sae_models sae_models
COPY steer_server steer_server
# The image has vLLM and torch; nothing may replace them.
RUN python3 -m pip install --no-cache-dir .

# As `vllm serve`, whose arguments it takes; VLLM_PLUGINS makes the plugin's routes load.
ENV VLLM_PLUGINS=steer_server,lora_filesystem_resolver,lora_hf_hub_resolver
ENTRYPOINT ["steer-server", "serve"]
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
