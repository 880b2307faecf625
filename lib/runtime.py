"""
What a script asks of the machine: device, precision, compilation, memory, ranks, signals.

'auto' means the best that works here. `set_up` prints in one line what was chosen.
"""
import atexit
import contextlib
import functools
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import sys
import time
import warnings

import torch
import torch.distributed as dist
from torch.nn import functional as F

from lib import console
from lib.configurator import ending_signals
from lib.console import fail, say, write

# Peak of dense bf16 products, of fp16 ones before Ampere, in FLOP/s, from NVIDIA's data sheets.
# The first name that fits counts, so a longer name comes before a shorter one.
PEAK_FLOPS = {
    'B200': 2250e12, 'H200 NVL': 835e12, 'H200': 989e12, 'H100 NVL': 835e12, 'H100 PCIe': 756e12,
    'H100': 989e12, 'A100': 312e12, 'A10G': 70e12, 'A40': 150e12, 'A6000': 155e12,
    'L40S': 362e12, 'L4': 121e12, 'A10': 125e12, 'V100': 125e12, 'T4': 65e12,
    'RTX 4090': 165e12, 'RTX 3090': 71e12}


# ---- device, precision, compilation --------------------------------------------------------------

def set_up(device, dtype, compile, deterministic=False, exact=False, pays=None):
    """Set torch's switches for a device; return (dtype, compile) without 'auto', and print them.

    deterministic: repeat every bit from run to run. exact: multiply float32 in full precision, for
    scripts whose figures count. pays: see find_compile."""
    dtype = find_dtype(dtype, device)
    if device.startswith('cuda:'):
        torch.cuda.set_device(device)   # the device on which streams and CUDA graphs are made
    precision = 'highest' if deterministic else _fp32_products(device, exact)
    torch.set_float32_matmul_precision(precision)
    torch.set_flush_denormal(True)
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')   # cuBLAS needs it to repeat
        torch.use_deterministic_algorithms(True)
    compile, why = find_compile(compile, device, pays)
    if device.startswith('cuda'):
        detail = torch.cuda.get_device_name(device)
    else:
        detail = f'{platform.machine()}, {torch.get_num_threads()} threads'
        if cpu_has_bf16():
            detail += ', bf16 in hardware'
    say(f'device {device} ({detail}), dtype {dtype}, compile {compile}{why}, '
        f'torch {torch.__version__}')
    return dtype, compile


def _fp32_products(device, exact):
    """Return torch's word for the precision of fp32 matrix products."""
    if device.startswith('cuda'):
        return 'highest' if exact else 'high'   # TF32
    # On AMD processors 'medium' means oneDNN instead of MKL's generic path, still in fp32: 1.2
    # times as fast for larger nets, no faster for the smallest (results/speed.md). On a Xeon with
    # AMX products are rounded to bf16 (pytorch PR #116015).
    rounds = getattr(torch.cpu, '_is_amx_tile_supported', lambda: False)()
    return 'highest' if exact and rounds else 'medium'


def find_device(name):
    """Return the device that a name stands for; fail for one that this machine does not have.

    'auto' is 'cuda', or else 'mps' where it computes right, or else 'cpu'."""
    usable = ['cpu']
    if torch.backends.mps.is_available():
        usable.insert(0, 'mps')
    if torch.cuda.is_available():
        usable.insert(0, 'cuda')
    if name == 'auto':
        if usable[0] == 'mps' and not computes_right('mps'):
            say("note: this machine's mps computes other numbers than its processor, "
                "which is used instead")
            return 'cpu'
        return usable[0]
    kind, _, index = str(name).partition(':')
    found = kind in usable
    if found and index:
        found = kind == 'cuda' and index.isdigit() and int(index) < torch.cuda.device_count()
    if not found:
        why = ''
        if kind == 'cuda' and kind not in usable:
            why = ' (no GPU was found, or no driver for one)'
            if not torch.version.cuda and not torch.version.hip:
                why = f' (torch {torch.__version__} was built without CUDA)'
        fail(f'device={name}: not on this machine{why}; it has {", ".join(usable)}; '
             f'type --device=auto')
    return name


def computes_right(device):
    """Return whether a small layer's loss and gradient on a device are those of the CPU.

    Apple's GPUs have computed wrong numbers without an error (TransformerLens #1178)."""
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 16, 32, generator=rng)
    weights = torch.randn(96, 32, generator=rng)
    targets = torch.arange(64) % 32
    found = []   # (loss, gradient) of each device
    try:
        for where in ('cpu', device):
            x = F.layer_norm(inputs.to(where), (32,))                     # (4, 16, 32)
            w = weights.to(where).requires_grad_()
            qkv = F.linear(x, w).view(4, 16, 6, 16).transpose(1, 2)       # (4, 6, 16, 16): 2 heads
            q, k, v = qkv.chunk(3, dim=1)                                 # (4, 2, 16, 16)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)   # (4, 2, 16, 16)
            y = F.gelu(y.transpose(1, 2).reshape(64, 32), approximate='tanh')
            loss = F.cross_entropy(y, targets.to(where))
            loss.backward()
            found.append((loss.detach().cpu(), w.grad.cpu()))
    except RuntimeError:
        return False
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*found))


def find_dtype(name, device):
    """Return the precision that a name stands for; fail for one that does not work on the device.

    'auto' is 'bfloat16' where the hardware has it, 'float16' on older GPUs, 'float32' elsewhere."""
    allowed = ('auto', 'float32', 'bfloat16', 'float16')
    if name not in allowed:
        fail(f'dtype={name}: allowed are {", ".join(allowed)}; type --dtype=auto')
    if name == 'float16' and not device.startswith('cuda'):
        fail(f'dtype=float16 needs a GPU (on a processor it is hundreds of times slower); '
             f'allowed on {device} are float32 and bfloat16; type --dtype=auto')
    if name != 'auto':
        return name
    if has_bf16(device):
        return 'bfloat16'
    return 'float16' if device.startswith('cuda') else 'float32'


def has_bf16(device):
    """Return whether a device multiplies bf16 in hardware, as far as is known."""
    if device.startswith('cuda'):
        # is_bf16_supported() is also true where bf16 is emulated (pytorch #148322)
        major, _ = torch.cuda.get_device_capability(device)
        return major >= 8
    return device == 'cpu' and cpu_has_bf16()


def cpu_has_bf16():
    """Return whether this processor multiplies bf16 in hardware.

    Emulation is 44 to 500 times slower (pytorch #146508)."""
    if not cpu_has_avx512():
        return False
    probes = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def cpu_has_avx512():
    """Return whether torch uses AVX512 here.

    ATEN_CPU_CAPABILITY=avx2 makes torch treat any processor as one with AVX2 only."""
    return torch.backends.cpu.get_cpu_capability().startswith('AVX512')


def autocast(device, dtype):
    """Return a context that runs matrix products in dtype.

    The residual stream stays in fp32, and with it the layer norms."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(device.partition(':')[0], dtype=getattr(torch, dtype))


def find_compile(choice, device, pays=None):
    """Return (whether to compile, a remark about it for the line that set_up prints).

    choice: 'auto', True or False. 'auto' is True where compiling pays and a first small function
    compiles. True fails where that function does not compile.
    pays: whether compiling pays. None stands for training, where it pays on CUDA and Linux. On a
    processor training gains a few percent at best, loses a sixth with dropout, and waits tens of
    seconds for it (results/negative.md)."""
    if type(choice) is not bool and choice != 'auto':
        fail(f'compile={choice}: allowed are auto, True, False; type --compile=auto')
    if choice is False:
        return False, ''
    if choice == 'auto':
        if pays is False or (pays is None and device == 'cpu'):
            return False, ''
        on_linux_gpu = device.startswith('cuda') and platform.system() == 'Linux'
        if pays is None and not on_linux_gpu:
            return False, f' (not tried on {device}, {platform.system()})'
    _keep_compiled_code()
    reason = _why_not_compiled(device)
    if not reason:
        return True, ''
    if choice == 'auto':
        return False, f' (torch.compile does not work here: {reason})'
    compiler = shutil.which(os.environ.get('CXX', 'g++')) or 'none'
    fail(f'compile=True, but torch.compile does not work here: {reason}; '
         f'it needs a C++ compiler (found: {compiler}); type --compile=False')


def _keep_compiled_code():
    """Let torch.compile store its code for the next run in a folder that outlives a restart.

    Each kind of processor has its own folder: code for AVX512 computes other numbers than code for
    AVX2, or does not run there."""
    caches = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    kind = torch.backends.cpu.get_cpu_capability()
    name = f'inductor-{torch.__version__}-{kind}'.replace(' ', '-')
    folder = os.path.join(caches, 'torch', name)
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
        os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', folder)


def _why_not_compiled(device):
    """Compile a small function; return why that failed, '' if it worked."""
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            # torch's own modules, imported here, use a deprecated part of torch
            warnings.filterwarnings('ignore', '.*torch.jit', DeprecationWarning)
            torch.compile(lambda x: (x + 1).sum())(torch.ones(8, device=device))
    except Exception as error:   # no compiler, no Triton, a Python too new: there are many kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0][:160]
    return ''


# ---- memory --------------------------------------------------------------------------------------

def check_memory(parameters, tokens):
    """Fail for a model or a micro-batch that cannot fit this machine's memory.

    parameters: of the model, at least. tokens: B * T. Failing late would fill the memory first."""
    if not hasattr(os, 'sysconf'):   # on Windows
        return
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    _check_fits(memory, f'{parameters:,} parameters', 4 * parameters,
                'a smaller --n_layer, --n_embd or --block_size')
    _check_fits(memory, f'a micro-batch of {tokens:,} tokens', 32 * tokens,
                'a smaller --batch_size or --block_size')


def _check_fits(memory, what, need, remedy):
    """Fail where something needs more bytes than the memory has."""
    if need > memory:
        fail(f'{what} need {need / 2**30:,.0f} GiB at the least and this machine has '
             f'{memory / 2**30:,.0f}; type {remedy}')


@contextlib.contextmanager
def explained_out_of_memory(batch_size, gradient_accumulation_steps, block_size, device):
    """Fail where the code inside runs out of memory, with settings that do the same with less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not is_known and "can't allocate memory" not in str(error):
            raise
        advice = 'type --grad_checkpointing, or a smaller --block_size or --n_embd'
        fewer = _largest_divisor_below(batch_size)
        if fewer:
            more = gradient_accumulation_steps * batch_size // fewer
            advice = (f'for the same tokens per step in less: type --batch_size={fewer} '
                      f'--gradient_accumulation_steps={more}')
        fail(f'out of memory at batch_size={batch_size}, block_size={block_size} on {device}; '
             f'{advice}')


def _largest_divisor_below(number):
    """Return the largest divisor of a number that is smaller than it, 0 for 1."""
    for divisor in range(number // 2, 0, -1):
        if number % divisor == 0:
            return divisor
    return 0


def peak_memory(device):
    """Return the largest memory that this process has had so far, in MB.

    This is resident memory, and on a GPU the memory that torch reserved there. nan on Windows."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_reserved(device) / 1e6
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform != 'darwin':   # elsewhere the unit is KiB
        resident *= 1024
    return resident / 1e6


# ---- time and speed ------------------------------------------------------------------------------

def wait(device):
    """Wait until a GPU has done all its work; return the time in seconds."""
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)
    elif device == 'mps':
        torch.mps.synchronize()
    return time.perf_counter()


def clock(seconds):
    """Return a duration for a reader: '1h 02m' for 3725, '2m 05s' for 125."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f'{hours:,}h {minutes:02d}m'
    return f'{minutes}m {seconds:02d}s'


def peak_flops(device):
    """Return a GPU's peak FLOP/s, by which MFU divides, None where the peak is not known."""
    if not device.startswith('cuda'):
        return None
    name = torch.cuda.get_device_name(device)
    for known, peak in PEAK_FLOPS.items():
        if re.search(rf'\b{known}\b', name):
            return peak
    return None


# ---- files: figures as JSON, and the lock of a folder --------------------------------------------

def check_json(path):
    """Fail where write_json could not write to path: now, not after minutes of work."""
    if path in ('', '-'):
        return
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        fail(f'json={path} cannot be written; type --json=FILE for another place, '
             f'or --json=- for stdout')


def write_json(path, figures):
    """Write figures as one JSON object: into the file path, to stdout for -, nowhere for ''."""
    text = json.dumps(figures, indent=1) + '\n'
    if path == '-':
        write(text)
    elif path:
        try:
            with open(path, 'w', encoding='utf-8') as f:
                f.write(text)
        except OSError as error:
            fail(f'json={path} cannot be written ({error.strerror}); '
                 f'type --json=FILE for another, or --json=- for stdout')


def lock(folder):
    """Return a file in folder that is locked until it is closed.

    Fail where another run has locked it. Without locks, on Windows and on some file systems, the
    file is open and nothing more."""
    file = open(os.path.join(folder, '.lock'), 'w', encoding='utf-8')
    try:
        import fcntl  # not on Windows
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        fail(f'out_dir={folder}: another run is writing into it; wait for its end, '
             f'or type --out_dir=FOLDER for another')
    except (ImportError, OSError):
        pass
    return file


# ---- CUDA graphs ---------------------------------------------------------------------------------

@functools.cache
def side_stream(device):
    """Return a stream of a GPU, the same in every call: torch keeps a pool of memory for each.

    Steps are tried and captured on the same stream. What torch makes for a stream at its first use
    is then there before the capture, in which it could not be made (pytorch PR #187745)."""
    return torch.cuda.Stream(device)


def aside(step):
    """Call step on a stream of its own; return its result.

    torch.cuda.graph asks for such a call before it captures the step."""
    stream = side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = step()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def captured(step):
    """Record step as a CUDA graph; return a function that replays it.

    The function returns the tensors that step returned, with new values."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side_stream(torch.cuda.current_device())):
        result = step()

    def replay():
        graph.replay()
        return result
    return replay


# ---- torchrun: the ranks -------------------------------------------------------------------------

def join_ranks(backend, device):
    """Return (rank, ranks, device) under torchrun, (0, 1, device) without.

    backend: 'auto' is nccl on GPUs and gloo elsewhere. Under torchrun device='cuda' becomes the
    rank's own GPU."""
    if 'RANK' not in os.environ:
        return 0, 1, device
    rank, ranks = place_among_ranks(device)
    allowed = ['auto', 'gloo']
    if device.startswith('cuda'):
        allowed.append('nccl')
    if backend not in allowed:
        fail(f'backend={backend}: allowed are auto, gloo and, on a GPU, nccl; type --backend=auto')
    if device == 'cuda':
        local = int(os.environ['LOCAL_RANK'])
        count = torch.cuda.device_count()
        if local >= count:
            fail(f'torchrun asks for GPU {local} and this machine has {count}; '
                 f'type --nproc_per_node={count}')
        device = f'cuda:{local}'
        torch.cuda.set_device(device)
    if device == 'mps':   # gloo has no collectives for it
        fail('device=mps: several ranks cannot share an Apple GPU; allowed are cpu and cuda; '
             'type --device=cpu')
    backends = 'gloo'
    if device.startswith('cuda') and backend != 'gloo':
        backends = 'cpu:gloo,cuda:nccl'   # with gloo, agree() does not wait for the GPU
    store = None
    if _shares_agent_store():
        store = _fresh_store(rank, ranks)
    dist.init_process_group(backends, store=store, rank=rank, world_size=ranks)
    return rank, ranks, device


def place_among_ranks(device):
    """Return (rank, ranks) from torchrun's variables.

    Fail where RANK is set without the others, and where one of them is not a number."""
    needed = ['RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT']
    if device == 'cuda':
        needed.append('LOCAL_RANK')
    lacking = [name for name in needed if not os.environ.get(name)]
    advice = ('type torchrun --standalone --nproc_per_node=2 before the script, '
              'or unset RANK for one process')
    if lacking:
        fail(f'RANK={os.environ["RANK"]} is set, as torchrun does, and {", ".join(lacking)} not; '
             f'{advice}')
    for name in needed:
        if name != 'MASTER_ADDR' and not os.environ[name].isdecimal():
            fail(f'{name}={os.environ[name]} is not a number, as torchrun sets it; {advice}')
    rank = int(os.environ['RANK'])
    ranks = int(os.environ['WORLD_SIZE'])
    if rank >= ranks:
        fail(f'RANK={rank} is not below WORLD_SIZE={ranks}; {advice}')
    return rank, ranks


def _shares_agent_store():
    """Return whether torchrun's own key-value store can be used."""
    return os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'


def _agent_store():
    """Return torchrun's own key-value store. It outlives a restart of the ranks."""
    host = os.environ['MASTER_ADDR']
    port = int(os.environ['MASTER_PORT'])
    return dist.TCPStore(host, port, is_master=False)


def _fresh_store(rank, ranks):
    """Return a key-value store in which the ranks find each other, new at every start.

    After a restart, torchrun's own store would hand out the addresses of dead processes
    (pytorch #135712). It only tells the ranks where the new store is."""
    host = os.environ['MASTER_ADDR']
    deadline = time.monotonic() + 300
    agent = _agent_store()
    if rank == 0:
        store = dist.TCPStore(host, 0, ranks, is_master=True, wait_for_workers=False)
        agent.set('port', str(store.port))
        return store
    while True:
        port = int(agent.get('port'))   # at first it may be that of a dead rank
        try:
            socket.create_connection((host, port), timeout=5).close()
            return dist.TCPStore(host, port, ranks, is_master=False)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def started_before(mark=False):
    """Return whether torchrun --max-restarts has restarted a run that had begun.

    mark: note that the run has begun."""
    if not _shares_agent_store():
        return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0
    store = _agent_store()
    if mark:
        store.set('begun', '1')
    return store.check(['begun'])


def leave(code):
    """End this process with an exit code, under torchrun all ranks together.

    Under torchrun Python is not shut down: now and then one of torch's threads is caught in that,
    and a rank that has done its work would end with SIGABRT."""
    if dist.is_initialized():
        dist.barrier()   # a rank that leaves while others work can bring them down
        dist.destroy_process_group()
        atexit._run_exitfuncs()   # trackers send their last rows there
        console.settle()
        os._exit(code)
    sys.exit(code)


def place():
    """Return (rank, ranks), (0, 1) without torchrun."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gathered(share, ranks):
    """Return the shares (n, ...) of all ranks, one after another: (ranks * n, ...).

    All ranks must call it together, with shares of one shape."""
    whole = share.new_empty(ranks * share.size(0), *share.shape[1:])
    dist.all_gather_into_tensor(whole, share)
    return whole


def total(values, device):
    """Return the sum of each number over all ranks."""
    if not dist.is_initialized():
        return values
    where = device if device.startswith('cuda') else 'cpu'
    summed = torch.tensor(values, dtype=torch.float64, device=where)
    dist.all_reduce(summed)
    return summed.tolist()


def agree(values):
    """Return the largest of each number over all ranks, so that all of them do the same."""
    if not dist.is_initialized():
        return values
    whole_numbers = all(isinstance(value, int) for value in values)
    largest = torch.tensor(values, dtype=torch.int64 if whole_numbers else torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def shard(model, ranks, device, dtype):
    """Split parameters, gradients and optimizer states over the ranks (FSDP2), block by block.

    The model may be on the CPU: each block moves to the device when it is split, so that no GPU
    ever holds all of the model. On GPUs in bf16 the ranks gather parameters in bf16, half the
    bytes, and sum gradients in fp32. The residual stream is in bf16 then."""
    # imported here: torch.distributed.fsdp takes half a second
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    settings = dict(mesh=dist.init_device_mesh(device.partition(':')[0], (ranks,)))
    if device.startswith('cuda') and dtype == 'bfloat16':
        settings['mp_policy'] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in model.transformer.h:
        fully_shard(block, **settings)
    fully_shard(model, **settings)
    # sampling calls `hidden`, which must gather the parameters as forward does
    register_fsdp_forward_method(model, 'hidden')


def is_sharded(value):
    """Return whether a value is a DTensor, a tensor that is split over the ranks.

    Importing that class would take half a second."""
    return hasattr(value, 'full_tensor')


def whole(tree):
    """Return a state dict with every sharded tensor gathered, on the CPU of rank 0.

    All ranks must call it together. On other ranks the tensors become None."""
    if is_sharded(tree):
        gathered = tree.full_tensor()
        return gathered.cpu() if dist.get_rank() == 0 else None
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value) for value in tree]
    return tree


# ---- signals -------------------------------------------------------------------------------------

class Signals:
    """Notes SIGINT, SIGTERM and SIGHUP, so that training can finish the step and save.

    caught: the number of the last signal, 0 before one. A second Ctrl-C ends the process at once,
    even during a save."""

    def __init__(self):
        self.caught = 0
        self.numbers = ending_signals()
        for number in self.numbers:
            signal.signal(number, self._note)

    def _note(self, number, frame):
        again = self.caught == number == signal.SIGINT
        if again and 'RANK' not in os.environ:   # torchrun repeats a Ctrl-C by itself
            os._exit(128 + number)
        self.caught = number

    def release(self):
        """Let signals end the process at once again."""
        for number in self.numbers:
            signal.signal(number, signal.SIG_DFL)
