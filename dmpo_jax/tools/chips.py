"""Data sheets of devices, and how to compile for those that are not here.

JAX's plugins compile for a TPU slice or for GPUs of one node on any machine: libtpu
from the slice's name, the CUDA plugin from a description of the card.
"""

import importlib.util
import os
import re
from typing import Any, NamedTuple

from dmpo_jax import fits


class Chip(NamedTuple):
  """Figures of one device from its data sheet."""

  memory: float  # GiB that programs and their arrays may take
  flops: float  # bfloat16, dense, per second
  bandwidth: float  # of its memory, bytes per second
  # Bytes per second that it receives in a collective. XLA sends one along a ring, in
  # both directions: over two of a TPU's four or six links, over all links of a GPU to
  # its switch, and over half of what PCIe moves both ways.
  network: float


# By the start of jax's device_kind; the first match counts. A card's memory is what its
# driver reports.
CHIPS = {
  'TPU v4': Chip(30.75, 275e12, 1.23e12, 100e9),
  'TPU v5 lite': Chip(15.75, 197e12, 0.82e12, 100e9),
  'TPU v5': Chip(95.74, 459e12, 2.76e12, 200e9),
  'TPU v6 lite': Chip(31.25, 918e12, 1.64e12, 224e9),
  'NVIDIA A100': Chip(79.25, 312e12, 2.04e12, 300e9),
  'NVIDIA H100': Chip(79.11, 989e12, 3.35e12, 450e9),
  'NVIDIA H200': Chip(141.0, 989e12, 4.8e12, 450e9),
  'NVIDIA B200': Chip(178.36, 2250e12, 7.67e12, 900e9),
  'NVIDIA L40S': Chip(44.39, 362e12, 0.864e12, 32e9),
}

# What XLA must know of a card (stream_executor.GpuTargetConfigProto), from the
# descriptions that XLA keeps of these cards; that of the L40S is from NVIDIA's papers.
CARD = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {core}
  shared_memory_per_block_optin: {block} threads_per_core_limit: {threads}
  core_count: {cores} fpus_per_core: {fpus} l2_cache_size: {cache}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {bandwidth} clock_rate_ghz: {clock} device_memory_size: {memory}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_address_bits: 64 name: "{name}"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {more} }}
  driver_version: "13.0.0" runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0" }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
HOPPER = dict(
  core=233472, block=232448, threads=2048, cores=132, fpus=128, cache=52428800,
  clock=1.98, major=9, minor=0, more='ACCELERATED_FEATURES',
)  # fmt: skip
CARDS = {
  'a100': dict(
    name='NVIDIA A100-SXM4-80GB', core=167936, block=166912, threads=2048, cores=108,
    fpus=64, cache=41943040, clock=1.41, major=8, minor=0, more='NONE',
  ),
  'h100': dict(HOPPER, name='NVIDIA H100 80GB HBM3'),
  'h200': dict(HOPPER, name='NVIDIA H200'),
  'b200': dict(
    HOPPER, name='NVIDIA B200', cores=148, cache=132644864, clock=1.965, major=10,
  ),
  'l40s': dict(
    name='NVIDIA L40S', core=102400, block=101376, threads=1536, cores=142, fpus=128,
    cache=100663296, clock=2.52, major=8, minor=9, more='NONE',
  ),
}  # fmt: skip
# There is no card to try kernels on. Without autotuning XLA takes matmul kernels of its
# own where a tuned program mostly calls cuBLAS. CUB's sort needs a card to compile.
OPTIONS = {
  'xla_gpu_autotune_level': 0,
  'xla_gpu_enable_triton_gemm': False,
  'xla_gpu_enable_cub_radix_sort': False,
}


def chip_of(device: Any) -> Chip | None:
  """Returns the data sheet of a device, if CHIPS has it."""
  kind = device.device_kind
  return next((x for name, x in CHIPS.items() if kind.startswith(name)), None)


def devices_of(name: str) -> list | None:
  """Returns the devices of --topology: h100, h100x8, v5p:4x4x4; None for ''.

  ValueError without the plugin that compiles for them, or for an unknown name.
  """
  if not name:
    return None
  if gpu := re.fullmatch(r'([a-z]+\d+[a-z]?)(?:x(\d+))?', name):
    return gpus(name, gpu[1], int(gpu[2] or 1))
  if not importlib.util.find_spec('libtpu'):
    raise ValueError(
      f'--topology={name} needs libtpu, which compiles for TPU slices on any machine: '
      f'pip install libtpu (GPUs are {", ".join(CARDS)}, or x8 of them)'
    )
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # no TPU host to ask
  from jax.experimental import topologies

  try:
    return list(topologies.get_topology_desc(name, 'tpu').devices)
  except Exception as error:  # libtpu has exceptions of its own
    raise ValueError(
      f'--topology={name}: {str(error).splitlines()[0]}; name a TPU slice such as '
      'v5e:4x4, v5p:2x4x4 or v6e:8x8 (only one process at a time can use libtpu), or '
      f'GPUs: {", ".join(CARDS)}, or h100x8 for eight'
    ) from None


def gpus(name: str, kind: str, count: int) -> list:
  """Returns so many GPUs of a kind, in one node."""
  if kind not in CARDS or not count:
    raise ValueError(
      f'--topology={name}: no such GPUs; name {", ".join(CARDS)}, or h100x8 for eight'
    )
  if not any(importlib.util.find_spec(f'jax_cuda{n}_plugin') for n in (12, 13)):
    raise ValueError(
      f"--topology={name} needs JAX's CUDA plugin, which compiles for GPUs on any "
      "machine: pip install -e '.[cuda]'"
    )
  from jax.experimental import topologies

  card = CARDS[kind]
  chip = next(x for start, x in CHIPS.items() if card['name'].startswith(start))
  text = CARD.format(
    **card, memory=int(chip.memory * fits.GIB), bandwidth=int(chip.bandwidth)
  )
  try:
    node = topologies.get_topology_desc(
      platform='cuda', topology=f'1x1x{count}', target_config=text
    )
  except Exception as error:  # of the plugin
    raise ValueError(f'--topology={name}: {str(error).splitlines()[0]}') from None
  return list(node.devices)


def target_of(device: Any, topology: str = '') -> fits.Target:
  """Returns how to compile for a device, and the bytes of it that JAX hands out.

  A device that is here is asked. Else the data sheet counts, of which the GPU's memory
  pool takes a part. Flags of XLA_FLAGS are left as they are.
  """
  here = '' if topology else fits.limit(device)
  chip = chip_of(device)
  if here or not chip:
    return fits.Target(here or 0)
  memory, gpu = chip.memory * fits.GIB, device.platform == 'gpu'
  if gpu:
    given = [os.environ[name] for name in fits.FRACTIONS if os.environ.get(name)]
    memory *= float([*given, fits.FRACTION][0])
  if not topology:
    return fits.Target(int(memory))
  flags = os.environ.get('XLA_FLAGS', '')
  options = {name: x for name, x in OPTIONS.items() if gpu and name not in flags}
  return fits.Target(int(memory), ('cuda' if gpu else device.platform,), options)
