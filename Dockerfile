# torch's wheels bring CUDA; the host brings the driver and NVIDIA's container toolkit.
#   docker build -t vitlit .
#   docker run --gpus all --shm-size 8g -v "$PWD:/work" vitlit fit --config pretrain
FROM python:3.12-slim
# torch.compile needs a C++ compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /vitlit
RUN pip install --no-cache-dir --constraint /vitlit/constraints.txt '/vitlit[all]' && rm -rf /vitlit
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
ENTRYPOINT ["vitlit"]
