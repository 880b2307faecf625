"""
What a script asks of the machine: device, precision, compilation, torchrun's ranks, signals.

'auto' means: the best that works here, and `set_up` says in one line what that came to.
"""
import atexit
import contextlib
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

# Dense bf16 (fp16 before Ampere) peak, FLOP/s, from NVIDIA's data sheets; what is not listed gets no MFU.
PEAK_FLOPS = {'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'A100': 312e12, 'A10G': 70e12, 'L40S': 362e12, 'L4': 121e12,
              'A10': 125e12, 'V100': 125e12, 'T4': 65e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12}


def clock(seconds):
    """3725 -> '1h 02m'; to be read, not computed with."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours:,}h {minutes:02d}m' if hours else f'{minutes}m {seconds:02d}s'


def check_json(path):
    """Fails now, not after minutes of work, where write_json could not write."""
    if path not in ('', '-') and (os.path.isdir(path) or not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK)):
        fail(f'json={path} cannot be written; type --json=FILE for another place, or --json=- for stdout')


def write_json(path, figures):
    """Write figures as one JSON object: into the file that --json names, to stdout for -, nowhere for ''."""
    text = json.dumps(figures, indent=1) + '\n'
    if path == '-':
        write(text)
        return
    try:
        if path:
            with open(path, 'w', encoding='utf-8') as f:
                f.write(text)
    except OSError as error:
        fail(f'json={path} cannot be written ({error.strerror}); type --json=FILE for another, or --json=- for stdout')


def computes_right(device):
    """Whether a small layer's loss and gradients on a device are those on the CPU: Apple's has been wrong without an error
    (TransformerLens #1178)."""
    rng, found = torch.Generator().manual_seed(0), []
    x, w, targets = torch.randn(4, 16, 32, generator=rng), torch.randn(96, 32, generator=rng), torch.arange(64) % 32
    try:
        for where in ('cpu', device):
            weight = w.to(where).requires_grad_()
            qkv = F.linear(F.layer_norm(x.to(where), (32,)), weight).view(4, 16, 6, 16).transpose(1, 2)   # of two heads
            y = F.scaled_dot_product_attention(*qkv.chunk(3, dim=1), is_causal=True).transpose(1, 2).reshape(64, 32)
            loss = F.cross_entropy(F.gelu(y, approximate='tanh'), targets.to(where))
            loss.backward()
            found.append([loss.detach().cpu(), weight.grad.cpu()])
        return all(torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4) for ours, theirs in zip(*found))
    except RuntimeError:
        return False


def find_device(name):
    """'auto' -> 'cuda', or else 'mps' where it computes right, or else 'cpu'; a name that cannot be had here fails."""
    usable = ['cuda'] * torch.cuda.is_available() + ['mps'] * torch.backends.mps.is_available() + ['cpu']
    if name == 'auto':
        if usable[0] == 'mps' and not computes_right('mps'):
            say('note: this machine\'s mps computes other numbers than its processor, which is used instead')
            return 'cpu'
        return usable[0]
    kind, _, index = str(name).partition(':')
    if kind not in usable or index and not (index.isdigit() and kind == 'cuda' and int(index) < torch.cuda.device_count()):
        fail(f'device={name}: not on this machine; it has {", ".join(usable)}; type --device=auto')
    return name


def cpu_has_avx512():
    """Return whether torch uses AVX512 here. ATEN_CPU_CAPABILITY=avx2 makes it treat any processor as one with AVX2 only."""
    return torch.backends.cpu.get_cpu_capability().startswith('AVX512')


def cpu_has_bf16():
    """Return whether this processor multiplies bf16 in hardware. Emulation is 44 to 500 times slower (pytorch #146508)."""
    if not cpu_has_avx512():
        return False
    probes = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def check_memory(parameters, tokens):
    """Fails for a model or a micro-batch (B·T tokens) that cannot fit this machine's memory, before anything fills it up."""
    have = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') if hasattr(os, 'sysconf') else math.inf
    for what, need, remedy in ((f'{parameters:,} parameters', 4 * parameters, 'a smaller --n_layer, --n_embd or --block_size'),
                               (f'a micro-batch of {tokens:,} tokens', 32 * tokens, 'a smaller --batch_size or --block_size')):
        if need > have:
            fail(f'{what} need {need / 2**30:,.0f} GiB at the least and this machine has {have / 2**30:,.0f}; type {remedy}')


@contextlib.contextmanager
def explained_out_of_memory(batch_size, gradient_accumulation_steps, block_size, device):
    """Fails where what is in it runs out of memory, with the settings that do the same with less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        fewer = next((b for b in range(batch_size // 2, 0, -1) if batch_size % b == 0), 0)
        more = gradient_accumulation_steps * batch_size // max(fewer, 1)
        fail(f'out of memory at batch_size={batch_size}, block_size={block_size} on {device}; ' + (
            f'for the same tokens per step in less: type --batch_size={fewer} --gradient_accumulation_steps={more}' if fewer
            else 'type --grad_checkpointing, or a smaller --block_size or --n_embd'))


def find_dtype(name, device):
    """'auto' -> 'bfloat16' where the hardware has it, 'float16' on older GPUs, 'float32' elsewhere."""
    allowed = ('auto', 'float32', 'bfloat16', 'float16')
    if name not in allowed:
        fail(f'dtype={name}: allowed are {", ".join(allowed)}; type --dtype=auto')
    if name == 'float16' and not device.startswith('cuda'):
        fail(f'dtype=float16 needs a GPU (on a processor it is hundreds of times slower); '
             f'allowed on {device} are float32 and bfloat16; type --dtype=auto')
    if name != 'auto':
        return name
    if device.startswith('cuda'):   # capability, since is_bf16_supported() is also true where it is emulated (pytorch #148322)
        return 'bfloat16' if torch.cuda.get_device_capability(device)[0] >= 8 else 'float16'
    return 'bfloat16' if device == 'cpu' and cpu_has_bf16() else 'float32'


def find_compile(choice, device, pays=None):
    """(compile or not, why). 'auto' is on where it pays and a first small function compiles.

    pays: None for training, where it does on CUDA and Linux; on a processor it gains a few percent at best, with dropout it
    loses a sixth, and it costs tens of seconds (results/negative.md)."""
    if type(choice) is not bool and choice != 'auto':
        fail(f'compile={choice}: allowed are auto, True, False; type --compile=auto')
    if choice is False or choice == 'auto' and (pays is False or pays is None and device == 'cpu'):
        return False, ''
    if choice == 'auto' and pays is None and not (device.startswith('cuda') and platform.system() == 'Linux'):
        return False, f' (not tried on {device}, {platform.system()})'
    # Compiled code is kept for the next run, outside of /tmp, which a restart empties. Each kind of processor has its own
    # folder: code for AVX512 computes other numbers than code for AVX2, or does not run there.
    cache = os.path.join(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'torch',
                         f'inductor-{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}'.replace(' ', '-'))
    with contextlib.suppress(OSError):
        os.makedirs(cache, exist_ok=True)
        os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', cache)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.filterwarnings('ignore', '.*torch.jit', DeprecationWarning)   # in torch's own modules, imported by this
            torch.compile(lambda x: (x + 1).sum())(torch.ones(8, device=device))
    except Exception as error:   # no compiler, no Triton, a Python too new: the kinds are many and not ours
        reason = str(error).strip().splitlines()[0][:160]
        if choice == 'auto':
            return False, f' (torch.compile does not work here: {reason})'
        fail(f'compile=True, but torch.compile does not work here: {reason}; it needs a C++ compiler '
             f'(found: {shutil.which(os.environ.get("CXX", "g++")) or "none"}); type --compile=False')
    return True, ''


def set_up(device, dtype, compile, deterministic=False, pays=None):
    """Resolve dtype and compile (pays: see find_compile) for a device and set torch's switches; returns (dtype, compile) and
    says it in one line."""
    dtype = find_dtype(dtype, device)
    if device.startswith('cuda:'):
        torch.cuda.set_device(device)   # where streams and CUDA graphs are made
    # fp32 products: TF32 on a GPU; on AMD processors oneDNN instead of MKL's generic path, still fp32: steps of larger nets
    # 1.2 times as fast, of the smallest no faster (results/speed.md); on an AMX Xeon this rounds to bf16 (pytorch PR #116015)
    torch.set_float32_matmul_precision('highest' if deterministic else 'high' if device.startswith('cuda') else 'medium')
    torch.set_flush_denormal(True)
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')   # cuBLAS repeats itself only with this
        torch.use_deterministic_algorithms(True)
    compile, why = find_compile(compile, device, pays)
    if device.startswith('cuda'):
        detail = torch.cuda.get_device_name(device)
    else:
        detail = f'{platform.machine()}, {torch.get_num_threads()} threads' + ', bf16 in hardware' * cpu_has_bf16()
    say(f'device {device} ({detail}), dtype {dtype}, compile {compile}{why}, torch {torch.__version__}')
    return dtype, compile


def autocast(device, dtype):
    """The context that runs matrix products in dtype and keeps norms and losses in fp32."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(device.partition(':')[0], dtype=getattr(torch, dtype))


def wait(device):
    """A clock in seconds, read when a GPU has done all that it was given."""
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device):
    """The most that this process has held, in MB: resident, or on a GPU what torch reserved there; nan where no one counts."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_reserved(device) / 1e6
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == 'darwin' else 1e6 / 1024)


def peak_flops(device):
    """FLOP/s to divide by for MFU, or None where the peak is not known."""
    if not device.startswith('cuda'):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if re.search(rf'\b{known}\b', name)), None)


# ---- CUDA graphs ---------------------------------------------------------------------------------------------------

def aside(step):
    """Run step on a stream of its own, as torch.cuda.graph asks of what is captured later."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = step()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def captured(step):
    """A function that replays step on the GPU and returns the tensors it returned, filled anew."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay():
        graph.replay()
        return result
    return replay


# ---- torchrun ------------------------------------------------------------------------------------------------------

def join_ranks(backend, device):
    """(rank, ranks, device) under torchrun, (0, 1, device) without. backend 'auto': nccl on GPUs, gloo elsewhere."""
    if 'RANK' not in os.environ:
        return 0, 1, device
    rank, ranks = place_among_ranks(device)
    allowed = ('auto', 'nccl', 'gloo')
    if backend not in allowed or backend == 'nccl' and not device.startswith('cuda'):
        fail(f'backend={backend}: allowed are auto, gloo and, on a GPU, nccl; type --backend=auto')
    if device == 'cuda':
        local, count = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
        if local >= count:
            fail(f'torchrun asks for GPU {local} and this machine has {count}; type --nproc_per_node={count}')
        device = f'cuda:{local}'
        torch.cuda.set_device(device)
    store = _fresh_store(rank, ranks) if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True' else None
    nccl = device.startswith('cuda') and backend != 'gloo'   # gloo beside it for agree, which then waits for no GPU
    dist.init_process_group('cpu:gloo,cuda:nccl' if nccl else 'gloo', store=store, rank=rank, world_size=ranks)
    return rank, ranks, device


def place_among_ranks(device):
    """Return (rank, ranks) from torchrun's variables; fail where RANK is there without the others, or not a number."""
    needed = ['RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT']
    if device == 'cuda':
        needed.append('LOCAL_RANK')
    missing = [name for name in needed if not os.environ.get(name)]
    advice = 'type torchrun --standalone --nproc_per_node=2 before the script, or unset RANK for one process'
    if missing:
        fail(f'RANK={os.environ["RANK"]} is set, as torchrun does, and {", ".join(missing)} not; {advice}')
    for name in needed:
        if name != 'MASTER_ADDR' and not os.environ[name].isdecimal():
            fail(f'{name}={os.environ[name]} is not a number, as torchrun sets it; {advice}')
    rank, ranks = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
    if rank >= ranks:
        fail(f'RANK={rank} is not below WORLD_SIZE={ranks}; {advice}')
    return rank, ranks


def started_before(mark=False):
    """Whether an earlier attempt under the same torchrun (--max-restarts) got so far as to mark the run as its own."""
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0
    store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False)
    if mark:
        store.set('begun', '1')
    return store.check(['begun'])


def lock(folder):
    """A file in folder that is locked as long as it is kept open; fails where another run has it open."""
    file = open(os.path.join(folder, '.lock'), 'w', encoding='utf-8')
    try:
        import fcntl  # not on Windows
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        fail(f'out_dir={folder}: another run is writing into it; wait for its end, or type --out_dir=FOLDER for another')
    except (ImportError, OSError):   # nor on every file system
        pass
    return file


def _fresh_store(rank, ranks):
    """The key-value store in which the ranks find each other, new at every start: torchrun's own outlives a restart and
    then hands out the addresses of dead processes (pytorch #135712)."""
    host, deadline = os.environ['MASTER_ADDR'], time.monotonic() + 300
    torchruns = dist.TCPStore(host, int(os.environ['MASTER_PORT']), is_master=False)
    if rank == 0:
        store = dist.TCPStore(host, 0, ranks, is_master=True, wait_for_workers=False)
        torchruns.set('port', str(store.port))
        return store
    while True:
        port = int(torchruns.get('port'))   # the one read first may be a dead rank's
        try:
            socket.create_connection((host, port), timeout=5).close()
            return dist.TCPStore(host, port, ranks, is_master=False)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def leave(code):
    """End this process with an exit code; under torchrun all ranks together, and without taking Python down around torch's
    threads: now and then one of them is caught in that, and a rank that has done its work ends with SIGABRT."""
    if dist.is_initialized():
        dist.barrier()   # a rank that leaves while others work can bring them down
        dist.destroy_process_group()
        atexit._run_exitfuncs()   # trackers send their last rows there
        console.settle()
        os._exit(code)
    sys.exit(code)


def total(values, device):
    """Sum a list of numbers over all ranks; SUM, because gloo has no average."""
    if not dist.is_initialized():
        return values
    summed = torch.tensor(values, dtype=torch.float64, device=device if device.startswith('cuda') else 'cpu')
    dist.all_reduce(summed)
    return summed.tolist()


def agree(values):
    """The largest of each number over all ranks, so that all of them take the same turn."""
    if not dist.is_initialized():
        return values
    whole_numbers = all(isinstance(value, int) for value in values)
    largest = torch.tensor(values, dtype=torch.int64 if whole_numbers else torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def shard(model, ranks, device):
    """Split parameters, and with them gradients and optimizer states, over the ranks (FSDP2), a block at a time."""
    # imported here: torch.distributed.fsdp takes half a second
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = dist.init_device_mesh(device.partition(':')[0], (ranks,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, 'hidden')   # what sampling calls gathers the parameters as forward does


def is_sharded(value):
    """Return whether a value is a DTensor, a tensor split over the ranks. Importing the class would take half a second."""
    return hasattr(value, 'full_tensor')


def whole(tree):
    """A state dict with every sharded tensor gathered, on the CPU; all ranks call it together."""
    if is_sharded(tree):
        return tree.full_tensor().cpu()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    return [whole(value) for value in tree] if isinstance(tree, list) else tree


# ---- signals -------------------------------------------------------------------------------------------------------

class Signals:
    """SIGINT, SIGTERM and SIGHUP, noted instead of obeyed, so that the step can be finished and saved."""

    def __init__(self):
        self.caught = 0
        self.numbers = ending_signals()
        for number in self.numbers:
            signal.signal(number, self._note)

    def _note(self, number, frame):
        if self.caught == number == signal.SIGINT and 'RANK' not in os.environ:   # torchrun itself repeats the first
            os._exit(128 + number)   # a second Ctrl-C: at once, even from inside of a save
        self.caught = number

    def release(self):
        """Obey signals again, at once."""
        for number in self.numbers:
            signal.signal(number, signal.SIG_DFL)
