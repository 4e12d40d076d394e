"""Write unreal data sets, and read every data set: unreal, CIFAR, ImageNet, CheXpert, a folder.

    python generate_data.py --kind noise --out data/noise             # 50,000 x 32 px, seconds
    python generate_data.py --kind random_labels --source cifar10 --out data/random_labels
    python generate_data.py --kind generated --out data/generated     # fractals, about a minute
    python generate_data.py --kind generated --generator mixed --like imagenet --out data/mixed
    python generate_data.py --kind generated --generator train --source cifar10 --out data/learned
    python generate_data.py --kind generated --num_images 2000 --probe --out data/small   # a minute

A set is made in a hidden folder and renamed when whole, so a run that was stopped is simply run
again; `--generator train` keeps its training in OUT.generator/ and goes on from there. `noise` is
Gaussian pixels with random labels; `random_labels` is new labels for a source's images, which stay
where they are: cifar10 or cifar100 in their python layout under --data_dir, imagenet, chexpert, a
written set, or a folder with a folder of images for each class (train/ and val/, or one tree).
`generated` draws images for labels: by formula (fractal, spectrum, deadleaves, mixed), by a
generator that is trained on a source's images, or by FILE, a generator of yours.
"""
import argparse
import contextlib
import copy
import csv
import ctypes
import errno
import functools
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import numpy as np

# Idle threads of OpenMP soon wait asleep: spinning on, they take the cores from other runs (two
# searches at once were 25 times as slow). It is read when torch is loaded.
os.environ.setdefault('GOMP_SPINCOUNT', '300')
import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageFont, ImageOps  # noqa: E402
from torch import nn  # noqa: E402

try:
    import fcntl
except ImportError:             # Windows: two runs at once may both make a missing set
    fcntl = None

RESIDENT = 2 << 30              # bytes: smaller sets live on the device, larger ones are streamed


# ---------------------------------------------------------------------------------------------
# User errors, files, progress: shared by every script


class UserError(Exception):
    """Something the user can mend. The text is one line: the thing, what is wrong, the mend."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the page of usage."""
    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                         allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f'{message} (see --help)')


def number(kind, low=-math.inf, high=math.inf, open_low=False, open_high=False):
    """An argparse type: a finite float, or int to 2^62, from low to high, open bounds left out."""
    if kind is int:
        high = min(high, 2 ** 62)

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f'{text[:99]!r} is no {kind.__name__}') from None
        inside = low <= value <= high and abs(value) < math.inf
        if not inside or (open_low and value == low) or (open_high and value == high):
            raise argparse.ArgumentTypeError(
                f'{text[:99]} is not {"above" if open_low else "from"} {low} '
                f'{"and below" if open_high else "to"} {high}')
        return value
    return parse


def name_or_path(text):
    """An argparse type: without the slash at its end, so that a folder has one name."""
    return text.rstrip('/') or text


def one_line_errors(main):
    """main(argv=None) -> exit status, where whatever the user can mend is one line and status 2."""
    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv) or 0
        except UserError as error:
            message = str(error)
        except torch.OutOfMemoryError:
            message = 'the device is out of memory: take a smaller --batch_size'
        except RuntimeError as error:
            ends = {"can't allocate memory": 'out of memory: take fewer or smaller images, or a '
                    'smaller --batch_size',
                    'DataLoader worker': 'a process that reads images has ended, of too little '
                    'memory or /dev/shm: take --workers 0'}
            if world()[1] > 1:                  # gloo's or NCCL's, of a process that is gone
                ends['peer|gloo|NCCL'] = 'another process of this run has ended: see what it ' \
                    'says; --resume goes on'
            message = next((text for end, text in ends.items() if re.search(end, str(error))), None)
            if message is None:
                raise
        except MemoryError:
            message = 'out of memory: take fewer or smaller images, or a smaller --batch_size'
        except BrokenPipeError:                 # the reader of a pipe has gone, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except OSError as error:
            mends = {errno.ENOSPC: 'free some space', errno.EROFS: 'choose another folder',
                     errno.EACCES: 'check its permissions', errno.ENOENT: 'check the path'}
            mend = mends.get(error.errno, 'check the file')
            message = f'{error.filename or "a file"}: {error.strerror or error}; {mend}'
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return 130
        print(f'{Path(main.__globals__["__file__"]).name}: error: {message}', file=sys.stderr)
        return 2
    return wrapped


@contextlib.contextmanager
def readable(what, mend):
    """UserError, `what` (why): `mend`, for whatever fails in the block; files' own errors pass."""
    try:
        yield
    except (OSError, UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f'{what} ({why}): {mend}') from None


def write_file(path, content):
    """Write text or bytes so that `path` is always the old file or the whole new one."""
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_file(path, content):
    """torch.save of plain types and tensors, whole or not at all; by the first process alone."""
    if not world()[0]:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_file(path, buffer.getvalue())


@contextlib.contextmanager
def locked(path):
    """Holds the file `path` for this process alone while the block runs; then it is removed."""
    held = False
    while not held:
        file = open(path, 'w')  # noqa: SIM115
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        # Who held it before may have removed it: then another file of that name is the lock.
        with contextlib.suppress(FileNotFoundError):
            held = not fcntl or os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        if not held:
            file.close()
    with file:
        try:
            yield
        finally:
            if fcntl:                               # elsewhere no open file can be removed
                os.unlink(path)


def check_out(out, force):
    """UserError where a set must not be written."""
    out = Path(out)
    if out.exists() and not force:
        raise UserError(f'{out} exists already: choose another --out, or --force to replace it')
    if out.is_file() or out.exists() and not (out / 'meta.json').exists() and any(out.iterdir()):
        raise UserError(f'{out} is no data set of ours: --force does not replace it')


@contextlib.contextmanager
def new_folder(out, force=False):
    """Yields a hidden folder beside `out` that takes its name when the block ends well.

    One process at a time; an `out` that exists, or came to be while this one waited, is refused
    without `force`. What killed runs left is removed.
    """
    out = Path(os.path.realpath(out))
    check_out(out, force)
    lock, temporary = (out.with_name(f'.{out.name}.{end}') for end in ('lock', f'tmp{os.getpid()}'))
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock):
        if fcntl:
            for left in out.parent.glob(f'.{out.name}.tmp*'):
                shutil.rmtree(left, ignore_errors=True)
        try:
            check_out(out, force)
            temporary.mkdir()
            yield temporary
            if out.exists():
                os.replace(out, out.with_name(f'.{out.name}.tmp-old'))
            os.replace(temporary, out)
        except OSError as error:
            error.filename = error.filename or str(out)
            raise
        finally:
            for left in (temporary, out.with_name(f'.{out.name}.tmp-old')):
                shutil.rmtree(left, ignore_errors=True)


def world():
    """(rank, number) of the processes that share this run, torchrun's; (0, 1) without it."""
    group = torch.distributed
    shared = group.is_available() and group.is_initialized()
    return (group.get_rank(), group.get_world_size()) if shared else (0, 1)


class Progress:
    """One line with what is done, the rate and the time left; in a log file one every 30 s."""
    def __init__(self, total, unit, done=0):
        self.total, self.unit, self.first = total, unit, done
        self.start = self.last = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def update(self, done, text=''):
        """done: units in all, counted from the very start; text: shown at the end of the line."""
        now = time.monotonic()
        if world()[0] or now - self.last < (0.2 if self.terminal else 30):
            return
        self.last = now
        rate = (done - self.first) / max(now - self.start, 1e-9)
        left = timedelta(seconds=round((self.total - done) / max(rate, 1e-9)))
        line = f'{done:,}/{self.total:,} {self.unit}  {rate:,.1f}/s  {left} left  {text}'
        print(line.ljust(78)[:118], end='\r' if self.terminal else '\n', file=sys.stderr)

    def close(self):
        if self.terminal and not world()[0]:
            print(' ' * 118, end='\r', file=sys.stderr, flush=True)


def choose_device(gpu, tf32=False):
    """torch.device for --gpu: a CUDA device, or the CPU for -1 and on a machine without CUDA.

    Under torchrun each process takes the device of its local rank, and joins the others.
    """
    # glibc would give large blocks back to the system at once and fault them in again on the next
    # step: keeping them saves up to a half of the time of memory-bound calls on a CPU.
    if platform.system() == 'Linux':
        libc = ctypes.CDLL(None)
        if hasattr(libc, 'mallopt'):
            libc.mallopt(-3, 1 << 30)               # M_MMAP_THRESHOLD
            libc.mallopt(-1, (1 << 31) - 1)         # M_TRIM_THRESHOLD
    set_tf32(tf32)
    shared = int(os.environ.get('WORLD_SIZE', 1)) > 1 and world()[1] == 1
    cuda = gpu >= 0 and torch.cuda.is_available()
    if shared and gpu >= 0:
        gpu = int(os.environ['LOCAL_RANK'])
    if cuda and gpu >= torch.cuda.device_count():
        raise UserError(f'--gpu {gpu}: this machine has CUDA devices 0 to '
                        f'{torch.cuda.device_count() - 1}; take one of them, or -1 for the CPU')
    if shared:              # the time is for a rank that makes a data set while the others wait
        torch.distributed.init_process_group('nccl' if cuda else 'gloo', timeout=timedelta(hours=6))
        if world()[0]:                          # one process speaks
            sys.stdout = open(os.devnull, 'w')  # noqa: SIM115
    if cuda:
        torch.backends.cudnn.deterministic = True
        torch.cuda.set_device(gpu)
    elif gpu >= 0 and not world()[0]:
        print(f'no CUDA on this machine: --gpu {gpu} runs on the CPU '
              f'({torch.get_num_threads()} threads)', file=sys.stderr)
    return torch.device('cuda', gpu) if cuda else torch.device('cpu')


def set_tf32(on):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


# ---------------------------------------------------------------------------------------------
# Noise and random labels. Only integers of Philox (Salmon et al., SC 2011) and a fixed table are
# used, so that a seed gives the same bytes on every machine and with every chunk size.

PIXELS, LABELS, CHOICE = 0, 1, 2          # independent streams of one seed


def philox(seed, stream, skip=0, count=0):
    """`count` 64-bit integers of a seed's stream, from the 4*skip-th on."""
    bits = np.random.Philox(np.random.SeedSequence([seed, stream])).advance(skip)
    return bits.random_raw(count)


@functools.cache
def normal_table():
    """uint8 (65536,): a uniform 16-bit integer -> a pixel of N(127.5, 32), clipped at 0 and 255.

    0 and 255 lie 3.98 standard deviations from the mean.
    """
    gauss = statistics.NormalDist(127.5, 32)
    edges = [round(65536 * gauss.cdf(pixel + 0.5)) for pixel in range(255)]
    return np.searchsorted(edges, np.arange(65536), side='right').astype(np.uint8)


def halves(seed, stream, start, count, n):
    """uint16 (count, n): n numbers for each image from `start` on."""
    blocks = -(-n // 16)                            # of 4 x 64 bits: 16 numbers of 16 bits each
    raw = philox(seed, stream, start * blocks, count * blocks * 4).astype('<u8', copy=False)
    return raw.view('<u2').reshape(count, -1)[:, :n]


def noise_images(seed, start, count, size):
    """Images start to start+count of the noise of a seed: uint8 (count, size, size, 3)."""
    draws = halves(seed, PIXELS, start, count, size * size * 3)
    return normal_table()[draws].reshape(count, size, size, 3)


def draw_labels(seed, num_images, num_classes, mode='uniform', true=None, multilabel=False):
    """Random labels from a generator of their own: int64 (n,), or uint8 (n, classes) multilabel.

    uniform: every class (or 0 and 1) equally likely; balanced: equally often; permute: the true
    labels, or rows of labels, in random order, so that their frequencies stay.
    """
    if mode == 'permute':
        return true[np.argsort(philox(seed, LABELS, count=num_images), kind='stable')]
    columns = num_classes if multilabel else 1
    raw = philox(seed, LABELS, count=num_images * columns).reshape(num_images, columns)
    values = 2 if multilabel else num_classes
    if mode == 'balanced':
        raw = np.argsort(np.argsort(raw, 0, kind='stable'), 0, kind='stable')
    labels = raw % np.uint64(values) if mode == 'uniform' else raw % values
    return labels.astype(np.uint8) if multilabel else labels[:, 0].astype(np.int64)


def redraw_labels(true, num_classes, seed, mode, label_noise):
    """The true labels with a share `label_noise` of them, chosen by seed, drawn anew."""
    count = round(label_noise * len(true))
    chosen = np.sort(np.argsort(philox(seed, CHOICE, count=len(true)), kind='stable')[:count])
    labels = true.copy()
    labels[chosen] = draw_labels(seed, count, num_classes, mode, true[chosen], true.ndim == 2)
    return labels


# ---------------------------------------------------------------------------------------------
# Generated images, procedural. All that is drawn at random comes from Philox, by the place of an
# image in the set; torch does the drawing, always in the same chunks, so that any slice can be
# made by itself: the same bytes on machines of one type with one version of torch.

BANK, DRAWS, FIELD, ROLLS = 3, 4, 5, 6      # more streams of a seed; glyph j adds 10 (j + 1)
FAMILIES = ['fractal', 'spectrum', 'deadleaves']
# How far images stray from their class (1: as published) and their background's deviation
DIFFICULTY = {'easy': (0.5, 0.08), 'medium': (1.0, 0.15), 'hard': (1.3, 0.17)}
SETTLE, ROUNDS = 16, 48                     # moves of a point before it counts, and in all
LEAVES = 128
# Labels of CheXpert, and the share of its training images that have them (arXiv 1901.07031)
CHEXPERT = {'No Finding': .0886, 'Enlarged Cardiomediastinum': .0481, 'Cardiomegaly': .1226,
            'Lung Opacity': .4939, 'Lung Lesion': .0365, 'Edema': .2606, 'Consolidation': .0678,
            'Pneumonia': .0244, 'Atelectasis': .1563, 'Pneumothorax': .0923,
            'Pleural Effusion': .4034, 'Pleural Other': .013, 'Fracture': .0387,
            'Support Devices': .564}


def uniforms(seed, stream, start, count, n):
    """float64 (count, n) between 0 and 1: n numbers for each image from `start` on."""
    raw = philox(seed, stream, start * -(-n // 4), count * -(-n // 4) * 4).reshape(count, -1)
    return ((raw[:, :n] >> np.uint64(40)) + 0.5) / 2 ** 24


class Procedural:
    """Images of one of FAMILIES, or of `mixed`, where each image draws its family.

    labels: int64 (N,); or uint8 (N, classes), and then the images are grey and every label that
    is present adds a fractal of its own. A method named as a family draws float (B, 3, size,
    size), from about 0 to 1, of labels (B,), u (B, 32) uniform numbers, rolls (B, n) numbers of 16
    bits and noise (B, 2, size, size) normal.
    """
    def __init__(self, family, labels, num_classes, size, seed, difficulty='medium', systems=8,
                 device='cpu'):
        self.labels, self.size, self.seed = labels, size, seed
        self.device = torch.device(device)
        self.names = FAMILIES if family == 'mixed' else [family]
        self.jitter, self.contrast = DIFFICULTY[difficulty]
        self.chunk, self.systems = max(8, 2 ** 15 // size ** 2), systems
        self.maps, self.table = (t.to(device) for t in fractal_bank(seed, num_classes * systems))
        self.spectra, leaves = torch.from_numpy(spread(seed, num_classes, 8)).float().to(
            device).split([3, 5], 1)
        mix = leaves[:, 1:].log().abs() ** 3         # one or two shapes prevail
        self.leaves = torch.cat([leaves[:, :1], mix / mix.sum(1, keepdim=True)], 1)

    def images(self, start, count):
        """uint8 (count, size, size, 3)."""
        ks = range(start // self.chunk, -(-(start + count) // self.chunk))
        if self.device.type == 'cuda':
            chunks = [self.draw(k) for k in ks]
        else:       # a thread for each chunk: within one, their number would show in last digits
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            with ThreadPoolExecutor(threads, None, torch.set_num_threads, (1,)) as pool:
                chunks = list(pool.map(self.draw, ks))
            torch.set_num_threads(threads)
        return np.concatenate(chunks)[start - ks[0] * self.chunk:][:count]

    def draw(self, k):
        """uint8 (B, size, size, 3): the k-th chunk."""
        start, s = k * self.chunk, self.size
        labels = torch.from_numpy(self.labels[start:start + self.chunk]).to(self.device)
        u, rolls = self.random(start, len(labels))
        normal = torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536)
        noise = halves(self.seed, FIELD, start, len(labels), 2 * s * s)
        noise = torch.from_numpy(normal.float().numpy()[noise]).view(-1, 2, s, s).to(self.device)
        if labels.ndim == 2:
            x = self.glyphs(labels, background(u, noise, self.contrast), start)
        else:
            x, which = torch.empty_like(noise[:, :1].expand(-1, 3, -1, -1)), u[:, 31]
            for f, name in enumerate(self.names):
                rows = ((which * len(self.names)).long() == f).nonzero()[:, 0]
                if len(rows):
                    x[rows] = getattr(self, name)(*(t[rows] for t in (labels, u, rolls, noise)))
        return (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    def random(self, start, count, stream=0):
        """(B, 32) numbers between 0 and 1, never 1 itself, and (B, n) of 16 bits."""
        u = torch.from_numpy(uniforms(self.seed, DRAWS + stream, start, count, 32)).float()
        u = u.clamp(max=1 - 2 ** -24)           # the largest of 2^24 is rounded to 1
        rolls = halves(self.seed, ROLLS + stream, start, count,
                       max(8 * LEAVES, ROUNDS * 8 * self.size)).astype(np.int32)
        return u.to(self.device), torch.from_numpy(rolls).to(self.device)

    def fractal(self, labels, u, rolls, noise, x=None, centre=0.5, reach=0.45):
        """A fractal of each label over x, or over a background of its own."""
        x = background(u, noise, self.contrast) if x is None else x
        system = labels * self.systems + (u[:, 0] * self.systems).long()
        opacity = fractal_opacity(self.maps[system], self.table[system], u, rolls, self.size,
                                  self.jitter, centre, reach)
        colour = hsv(u[:, 8], 0.2 + 0.7 * u[:, 9], 0.8 + 0.2 * u[:, 10])
        return x + opacity * (colour[:, :, None, None] - x)

    def glyphs(self, labels, x, start):
        """Small fractals of all labels that are present over the grey background x."""
        x = x.mean(1, keepdim=True).expand(-1, 3, -1, -1).clone()
        for j in range(labels.sum(1).max()):            # the j-th label of those that have it
            u, rolls = self.random(start, len(labels), 10 * (j + 1))
            rows = (labels.sum(1) > j).nonzero()[:, 0]
            label = (labels[rows].cumsum(1) <= j).sum(1)
            u, rolls = u[rows], rolls[rows]
            u[:, 9] = -0.2 / 0.7                        # no saturation: white
            x[rows] = self.fractal(label, u, rolls, None, x[rows], 0.2 + 0.6 * u[:, 11:13], 0.18)
        return x

    def spectrum(self, labels, u, rolls, noise):
        """Gaussian fields with power 1/f^slope, stretched along an angle, between two colours."""
        strays = torch.tensor([0.17, 0.17, 0.085], device=u.device) * self.jitter
        slope, stretch, turn = (self.spectra[labels] + strays * (2 * u[:, :3] - 1)).unbind(1)
        angle = math.pi / 2 * turn * (1 - 2 * (u[:, 10] < 0.5).float())     # flips keep the class
        x = smooth_field(noise[:, :1], 0.8 + 2.7 * slope, 8 ** (0.1 + stretch), angle)
        x = x + 4 * self.contrast * smooth_field(noise[:, 1:], 2 + u[:, 3])
        x = torch.sigmoid(1.7 * x / x.std((2, 3), keepdim=True))
        dark = hsv(u[:, 4], u[:, 5], 0.35 * u[:, 6])[:, :, None, None]
        light = hsv(u[:, 7], 0.6 * u[:, 8], 0.7 + 0.3 * u[:, 9])[:, :, None, None]
        return dark + x * (light - dark)

    def deadleaves(self, labels, u, rolls, noise):
        """Shapes that cover one another (arXiv 2106.05963), more small ones than large ones."""
        exponent, *shares = self.leaves[labels].unbind(1)
        exponent = 8 * exponent + 0.2 * self.jitter * (2 * u[:, 0] - 1)      # published: 3
        exponent = torch.where((exponent - 1).abs() < 0.01, 1.01, exponent)
        draws = ((rolls[:, :8 * LEAVES].view(-1, 8, LEAVES) + 0.5) / 65536).unbind(1)
        which = (draws[1][..., None] > torch.stack(shares, 1).cumsum(1)[:, None, :3]).sum(-1)
        low, high, power = 0.03, 0.5, (1 - exponent)[:, None]      # radius / size of the image
        radius = (low ** power + draws[0] * (high ** power - low ** power)) ** (1 / power)
        fine = 2 * self.size if self.size < 128 else 3 * self.size // 2
        front = front_leaves(which, radius, *draws[2:5], fine)
        hue = (u[:, 1:2] + 0.35 * (draws[5] - 0.5)) % 1             # a palette for each image
        colours = hsv(hue, u[:, 2:3] * draws[6], 0.15 + 0.8 * draws[7])
        x = torch.stack([c.gather(1, front.flatten(1)) for c in colours.unbind(-1)], 1)
        x = nn.functional.adaptive_avg_pool2d(x.view(-1, 3, fine, fine), self.size)
        return x + self.contrast / 3 * smooth_field(noise[:, :1], 2 + u[:, 3])


def fractal_bank(seed, n):
    """n iterated function systems of 2 to 4 contractive maps (Anderson and Farrell, WACV 2022).

    A map is rotation x diag(s1, s2) x rotation, 0 < s2 <= s1 < 1 with signs, and a translation.
    Returns maps (n, 4, 7): a row of the matrix and its translation, twice, and s1; and table
    (n, 256): the map that a random byte picks, more often the larger its determinant.
    """
    u = uniforms(seed, BANK, 0, n, 32 + 8 * 256)
    count = 2 + (3 * u[:, :1]).astype(int)
    live = np.arange(4) < count
    tries = np.sort(u[:, 32:].reshape(n, 256, 4, 2))[..., ::-1]     # the first try that fits
    total = ((tries[..., 0] + 2 * tries[..., 1]) * live[:, None]).sum(-1)
    fits = (total >= (5 + count) / 2) & (total <= (6 + count) / 2)
    s = tries[np.arange(n), fits.argmax(1)]
    angles, signs, shift = (2 * u[:, 1:25].reshape(3, n, 4, 2) - 1)
    (c1, c2), (s1, s2) = (np.moveaxis(f(np.pi * angles), -1, 0) for f in (np.cos, np.sin))
    d1, d2 = np.moveaxis(s * np.sign(signs), -1, 0)
    maps = np.stack([c1 * d1 * c2 - s1 * d2 * s2, -c1 * d1 * s2 - s1 * d2 * c2, shift[..., 0],
                     s1 * d1 * c2 + c1 * d2 * s2, c1 * d2 * c2 - s1 * d1 * s2, shift[..., 1],
                     s[..., 0]], -1)
    weight = np.maximum(s.prod(-1), 0.03) * live
    edges = 256 * np.cumsum(weight, 1) / weight.sum(1, keepdims=True)
    table = (edges[:, None, :3] <= np.arange(256)[:, None]).sum(-1)
    return torch.from_numpy(maps).float(), torch.from_numpy(table)


def fractal_opacity(maps, table, u, rolls, size, jitter, centre, reach):
    """(B, 1, size, size): logarithm of the density of points that hop by maps drawn at random.

    centre, in shares of the image, and reach, half a side, say where it lies, before jitter. One
    of the maps, the window and the direction change from image to image. Drawn at twice the size.
    """
    maps, b, points = maps.clone(), len(maps), 16 * size
    rows = torch.arange(b, device=maps.device)
    which = table[rows, (256 * u[:, 1]).long()]
    grow = 1 - jitter * (0.2 - 0.3 * u[:, 2])                       # U(0.8, 1.1) at jitter 1
    grow = torch.minimum(grow, 0.98 / maps[rows, which, 6])
    maps[rows[:, None], which[:, None], [0, 1, 3, 4, 6]] *= grow[:, None]
    rolls = rolls[:, :ROUNDS * points // 2]
    chosen = table.gather(1, torch.cat([rolls & 255, rolls >> 8], 1).long()) + 4 * rows[:, None]
    maps, path = maps.flatten(0, 1)[:, :6].contiguous(), []
    x = y = torch.zeros(b, points, device=u.device)
    for t, hop in enumerate(chosen.view(b, ROUNDS, points).unbind(1)):
        m = nn.functional.embedding(hop, maps).unbind(-1)
        x, y = m[0] * x + m[1] * y + m[2], m[3] * x + m[4] * y + m[5]
        if t >= SETTLE:
            path.append(torch.stack([x, y], 1))
    path = torch.cat(path, 2) * torch.where(u[:, 3:5] < 0.5, -1, 1)[:, :, None]      # flips
    low, high = path.amin(2, keepdim=True), path.amax(2, keepdim=True)
    zoom = 2 * reach * (1 + 0.3 * jitter * (u[:, 5] - 0.6))
    shift = centre + 0.3 * reach * jitter * (u[:, 6:8] - 0.5)
    path = (path - (low + high) / 2) * (zoom[:, None] / (high - low).amax(1))[:, None] \
        + shift[:, :, None]
    at = (path * (2 * size)).floor()
    inside = ((at >= 0) & (at < 2 * size)).all(1)
    at = torch.where(inside, at[:, 1] * (2 * size) + at[:, 0], 0).long()
    at += rows[:, None] * (2 * size) ** 2
    counts = torch.bincount(torch.where(inside, at, b * (2 * size) ** 2).flatten(),
                            minlength=b * (2 * size) ** 2 + 1)[:-1]
    tone = nn.functional.avg_pool2d(counts.view(b, 1, 2 * size, 2 * size).float().log1p(), 2)
    return tone / tone.amax((1, 2, 3), keepdim=True).clamp(min=1e-6)


def in_shape(shape, x, y):
    """Whether (x, y) lies in shape 0 disc, 1 ring, 2 triangle or 3 bar, all of radius 1."""
    if shape == 0:
        return x * x + y * y < 1
    if shape == 1:
        return (x * x + y * y - 0.72).abs() < 0.28
    if shape == 2:
        return (y > -0.5) & (3 ** 0.5 * x.abs() + y < 1)
    return (x.abs() < 0.98) & (y.abs() < 0.14)


def front_leaves(which, radius, turn, x, y, size):
    """int64 (B, size, size): which of the leaves is the front one, the last where there is none.

    which: 0 to 3, as in in_shape; radius, x, y in shares of the image, turn of a circle; (B, n).
    """
    b, n = which.shape
    front = torch.full((b * size * size,), n - 1, device=which.device)
    image, order = torch.meshgrid(torch.arange(b, device=which.device),
                                  torch.arange(n, device=which.device), indexing='ij')
    radius, x, y = radius * size, (1.2 * x - 0.1) * size, (1.2 * y - 0.1) * size
    side, smaller = 2, 0
    while smaller < radius.max():               # leaves of one shape and about one size at a time
        at, width = torch.arange(-side, side + 1, device=which.device), 2 * side + 1
        for shape in range(4):
            some = ((which == shape) & (radius > smaller) & (radius <= side)).nonzero(as_tuple=True)
            columns, lines = (c[some].long()[:, None] + at for c in (x, y))
            dx, dy = (torch.where((cells < 0) | (cells >= size), math.inf,
                                  (cells + 0.5 - c[some][:, None]) / radius[some][:, None])
                      for cells, c in ((columns, x), (lines, y)))
            c, s = (f(2 * math.pi * turn[some])[:, None] for f in (torch.cos, torch.sin))
            px = (c * dx)[:, None, :] + (s * dy)[:, :, None]        # not finite: out of the image
            py = (c * dy)[:, :, None] - (s * dx)[:, None, :]
            hit = in_shape(shape, px, py).flatten().nonzero()[:, 0]
            leaf, cell = hit // width ** 2, hit % width ** 2
            corner = (image[some] * size + lines[:, 0]) * size + columns[:, 0]
            front.scatter_reduce_(0, corner[leaf] + cell // width * size + cell % width,
                                  order[some][leaf], 'amin')
        smaller, side = side, math.ceil(1.4 * side)
    return front.view(b, size, size)


def spread(seed, n, k):
    """float64 (n, k): n points of the unit cube far from one another (Roberts's R sequence)."""
    phi = 2.0
    for _ in range(64):
        phi = (1 + phi) ** (1 / (k + 1))
    steps = np.outer(np.arange(1, n + 1), phi ** -np.arange(1.0, k + 1))
    return (uniforms(seed, BANK, 0, 1, k) + steps) % 1


def smooth_field(noise, slope, stretch=None, angle=None):
    """Gaussian fields with power 1/f^slope and deviation 1: noise (B, 1, S, S), the rest (B,)."""
    size = noise.shape[-1]
    fy = torch.fft.fftfreq(size, device=noise.device)[:, None]
    fx = torch.fft.rfftfreq(size, device=noise.device)
    if angle is not None:
        c, s, stretch = (v[:, None, None] for v in (angle.cos(), angle.sin(), stretch))
        fx, fy = (c * fx + s * fy) * stretch ** 0.5, (c * fy - s * fx) / stretch ** 0.5
    square = (fx ** 2 + fy ** 2).expand(len(noise), -1, -1).clone()
    square[:, 0, 0] = math.inf                  # no mean
    x = torch.fft.rfft2(noise) * (square ** (-slope[:, None, None] / 4))[:, None]
    x = torch.fft.irfft2(x, s=(size, size))
    return x / x.std((2, 3), keepdim=True)


def hsv(hue, saturation, value):
    """(..., 3) red, green and blue, all between 0 and 1."""
    sixth = (6 * hue[..., None] + torch.tensor([0., 4, 2], device=hue.device)) % 6
    pure = ((sixth - 3).abs() - 1).clamp(0, 1)
    return value[..., None] * (1 - saturation[..., None] * (1 - pure))


def background(u, noise, contrast):
    """(B, 3, S, S): a smooth field in a faint colour, with a weaker one in another colour."""
    one = torch.ones_like(u[:, 0])
    tint = hsv(u[:, 20], 0.5 * u[:, 21], one)[:, :, None, None]
    other = (hsv(u[:, 22], one, one) - 0.5)[:, :, None, None]
    level, slope = 0.15 + 0.3 * u[:, 23, None, None, None], 2 + u[:, 24]
    contrast = contrast * (0.8 + 0.4 * u[:, 25, None, None, None])
    return tint * (level + contrast * smooth_field(noise[:, :1], slope)) \
        + contrast / 2 * other * smooth_field(noise[:, 1:], slope)


# ---------------------------------------------------------------------------------------------
# Generated images from a network: one trained here, or the user's


class ResBlock(nn.Module):
    """Two 3x3 convolutions that the condition scales and shifts, then attention if asked for."""
    def __init__(self, c_in, c_out, emb, attention):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(16, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(16, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.condition = nn.Linear(emb, 2 * c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.norm3 = nn.GroupNorm(16, c_out) if attention else None
        self.attention = nn.MultiheadAttention(c_out, 4, batch_first=True) if attention else None
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x, e):
        scale, shift = self.condition(e)[:, :, None, None].chunk(2, 1)
        y = self.norm2(self.conv1(nn.functional.silu(self.norm1(x)))) * (1 + scale) + shift
        x = self.skip(x) + self.conv2(nn.functional.silu(y))
        if self.attention is not None:
            tokens = self.norm3(x).flatten(2).transpose(1, 2)
            tokens, _ = self.attention(tokens, tokens, tokens, need_weights=False)
            x = x + tokens.transpose(1, 2).reshape(x.shape)
        return x


class UNet(nn.Module):
    """Velocity of a rectified flow: images (B, 3, S, S), time (B,), condition (B, classes + 1)."""
    def __init__(self, size, num_classes, emb=256):
        super().__init__()
        if size % 8:
            raise UserError(f'{size} px: the generator that is trained here needs a multiple of 8')
        levels = 2
        while size % 2 ** levels == 0 and size >> levels >= 4:
            levels += 1
        widths = ([64] * levels + [128, 192, 240])[-levels:]
        small = [size >> k <= 8 for k in range(levels)]             # where there is attention
        self.frequencies = nn.Parameter(torch.randn(64) * 8, requires_grad=False)
        self.embed = nn.Sequential(nn.Linear(128 + num_classes + 1, emb), nn.SiLU(),
                                   nn.Linear(emb, emb), nn.SiLU())
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(ResBlock(widths[max(k - 1, 0)], widths[k], emb, small[k])
                                  for k in range(levels))
        self.middle = ResBlock(widths[-1], widths[-1], emb, True)
        self.up = nn.ModuleList(ResBlock(widths[min(k + 1, levels - 1)] + widths[k], widths[k],
                                         emb, small[k]) for k in reversed(range(levels)))
        self.head = nn.Sequential(nn.GroupNorm(16, widths[0]), nn.SiLU(),
                                  nn.Conv2d(widths[0], 3, 3, padding=1))

    def forward(self, x, t, y):
        phase = 2 * math.pi * t[:, None] * self.frequencies
        e = self.embed(torch.cat([phase.cos(), phase.sin(), 8 * y], 1))     # 8: as much as time
        x, kept = self.stem(x), []
        for block in self.down:
            x = block(nn.functional.avg_pool2d(x, 2) if kept else x, e)
            kept.append(x)
        x = self.middle(x, e)
        for block in self.up:
            if x.shape != kept[-1].shape:
                x = nn.functional.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([x, kept.pop()], 1), e)
        return self.head(x)


def conditions(labels, num_classes):
    """float (B, classes + 1) of labels (B,) or (B, classes); the last column stands for "any"."""
    rows = labels if labels.ndim == 2 else nn.functional.one_hot(labels, num_classes)
    return nn.functional.pad(rows.float(), (0, 1))


def flow_loss(network, x, y, seed, device):
    """Of a rectified flow from noise to images x (arXiv 2209.03003), a tenth without labels y."""
    rng = torch.Generator(device).manual_seed(seed)
    t = torch.sigmoid(torch.randn(len(x), generator=rng, device=device))
    noise = torch.randn(x.shape, generator=rng, device=device)
    drop = (torch.rand(len(x), 1, generator=rng, device=device) < 0.1).float()
    y = torch.cat([y[:, :-1] * (1 - drop), drop], 1)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda'):
        velocity = network(torch.lerp(noise, x, t[:, None, None, None]), t, y)
    return (velocity.float() - (x - noise)).square().mean()


def train_generator(source, folder, steps, minutes, seed, device):
    """Train a flow on a Data, going on where `folder` left off; saves its generator.pt.

    log.jsonl gets the mean loss of every 20 steps. All draws of a step come from its number.
    """
    about = {'classes': source.classes, 'size': source.image_size, 'mean': source.mean,
             'std': source.std, 'labels': torch.from_numpy(source.labels), 'seed': seed,
             'images': source.sha256()}
    torch.manual_seed(seed)
    network = UNet(source.image_size, len(source.classes)).to(device)
    average = copy.deepcopy(network)                    # of the weights: what draws images
    weights = [p for p in network.parameters() if p.requires_grad]
    averages = [p for p in average.parameters() if p.requires_grad]
    adam = torch.optim.Adam(weights)
    batches = Batches(source, range(len(source)), min(64, len(source)), device, seed=seed)
    step, seconds, lines = 0, 0.0, []
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / 'checkpoint.pt').exists():
        state = load_generator(folder / 'checkpoint.pt')
        if any(state[key] != about[key] for key in ('images', 'seed', 'classes', 'size')) \
                or not torch.equal(state['labels'], about['labels']):
            raise UserError(f'{folder} is of other images, labels or another seed: remove it, or '
                            'choose another --out')
        for key, item in (('network', network), ('average', average), ('adam', adam)):
            item.load_state_dict(state[key])
        step, seconds, lines = state['step'], state['seconds'], state['lines']
    progress, began, saved = Progress(steps, 'steps', step), time.time() - seconds, time.time()
    losses, late = [], seconds > 60 * minutes
    while step < steps and not late:
        for x, y in batches.epoch(*divmod(step, len(batches))):
            loss = flow_loss(network, x, conditions(y, len(source.classes)),
                             (seed * 10 ** 9 + step) % 2 ** 63, device)
            loss.backward()
            adam.param_groups[0]['lr'] = 5e-4 * min(1, (step + 1) / 100)
            torch.nn.utils.clip_grad_norm_(weights, 1)
            adam.step()
            adam.zero_grad()
            step += 1
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1 - min(0.999, step / (step + 10)))
            losses.append(loss.detach())
            if step % 20 and step < steps:
                continue
            mean, seconds, losses = torch.stack(losses).mean().item(), time.time() - began, []
            if not math.isfinite(mean):
                raise UserError(f'{folder}: the loss is not finite at step {step}: another --seed')
            lines.append({'step': step, 'loss': mean, 'seconds': round(seconds, 1)})
            progress.update(step, f'loss {mean:.3f}')
            late = seconds > 60 * minutes
            if late or step == steps or time.time() - saved > 60:
                saved = time.time()
                save_file(folder / 'checkpoint.pt', {
                    **about, 'network': network.state_dict(), 'average': average.state_dict(),
                    'adam': adam.state_dict(), 'step': step, 'seconds': seconds, 'lines': lines})
                write_file(folder / 'log.jsonl', ''.join(json.dumps(x) + '\n' for x in lines))
            if late or step == steps:
                break
    progress.close()
    save_file(folder / 'generator.pt', {**about, 'average': average.state_dict(),
                                             'step': step})


def load_generator(path):
    """The state of a generator that was trained here; UserError where it is not one."""
    with readable(f'{path} is no generator that was trained here',
                  'for one of yours give a .pt2, or --generator_code as well'):
        state = torch.load(path, map_location='cpu', weights_only=True)
        if not {'average', 'labels', 'classes', 'size', 'mean', 'std'} <= set(state):
            raise ValueError('other contents')
        return state


def trained_flow(state, device, guidance=1.5, steps=30):
    """f(z, y) -> images between 0 and 1, of load_generator's state: Euler steps with guidance."""
    classes, size = len(state['classes']), state['size']
    network = UNet(size, classes).to(device).eval()
    network.load_state_dict(state['average'])
    mean, std = (torch.tensor(state[key], device=device)[:, None, None] for key in ('mean', 'std'))

    def f(z, y):
        x, y = z.view(-1, 3, size, size), conditions(y, classes)
        y = torch.cat([y, conditions(torch.zeros_like(y[:, 1:]), classes)])
        y[len(x):, -1] = 1
        for k in range(steps):
            t = torch.full((2 * len(x),), k / steps, device=device)
            given, free = network(torch.cat([x, x]), t, y).chunk(2)
            x = x + (free + guidance * (given - free)) / steps
        return x * std + mean
    return f


def users_generator(args, device):
    """f(z, y) -> images, from a program of torch.export or from code and a state dict."""
    path, code = Path(args.generator), args.generator_code
    if not path.is_file():
        raise UserError(f'--generator {path}: neither one of {", ".join(FAMILIES)}, mixed and '
                        'train nor a file: check its path')
    if not args.trust_generator:
        raise UserError(f'{code or path} is a program, and opening it can run any code: check '
                        'where it comes from, then add --trust_generator')
    logging.getLogger('torch.export').setLevel(logging.CRITICAL)    # what fails is said below
    with readable(f'{code or path}: cannot be loaded',
                  'give a torch.export program, or file.py:factory and its state dict'):
        if code:
            file, _, factory = code.partition(':')
            spec = importlib.util.spec_from_file_location('generator_code', file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            network = getattr(module, factory)()
            network.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
            network.eval()
        else:
            network = torch.export.load(path).module()
        network = network.to(device)
    if args.label_input == 'index':
        return network
    return lambda z, y: network(z, nn.functional.one_hot(y, args.num_classes).float())


def latents(seed, start, count, z_dim, dist='normal', truncation=1.0):
    """float (count, z_dim); truncnorm is cut at 2 before it is scaled, uniform is from -1 to 1."""
    u = torch.from_numpy(uniforms(seed, DRAWS, start, count, z_dim))
    cut = torch.special.ndtr(torch.tensor(-2.0, dtype=u.dtype))
    z = {'normal': lambda: torch.special.ndtri(u), 'uniform': lambda: 2 * u - 1,
         'truncnorm': lambda: torch.special.ndtri(cut + u * (1 - 2 * cut))}[dist]()
    return (truncation * z).float()


@torch.no_grad()
def network_images(f, z, labels, low, high, size, device):
    """uint8 (B, size, size, 3) of f(z, y), whose values are from low to high."""
    with readable(f'the generator fails on z {tuple(z.shape)} and {len(labels)} labels',
                  'check --z_dim, --num_classes, --label_input'):
        x = f(z.to(device), torch.from_numpy(labels).to(device))
        shape = tuple(x.shape)
    if len(shape) != 4 or shape[0] != len(labels) or shape[1] not in (1, 3):
        raise UserError(f'the generator gives {shape} for {len(labels)} images: N x C x H x W with '
                        '1 or 3 channels is needed')
    x = x.float()
    if not x.isfinite().all():
        raise UserError('the generator gives values that are not finite: check --truncation and z')
    x = (x - low) / (high - low)
    if min(shape[2:]) != size or shape[2] != shape[3]:
        sides = [max(size, round(side * size / min(shape[2:]))) for side in shape[2:]]
        x = nn.functional.interpolate(x, sides, mode='bicubic', antialias=True)
        top, left = ((side - size) // 2 for side in sides)
        x = x[:, :, top:top + size, left:left + size]
    x = (x.clamp(0, 1) * 255).round().byte().expand(-1, 3, -1, -1)
    return x.permute(0, 2, 3, 1).cpu().numpy()


def check_generator(f, z, labels, num_classes, low, high, device):
    """UserError where the values of a user's f(z, y) are of another range, or y changes nothing."""
    x, other = (network_images(f, z, y, low, high, 16, device) for y in (
        labels, (labels + 1) % num_classes))
    with torch.no_grad():
        values = f(z.to(device), torch.from_numpy(labels).to(device)).float()
    outside = ((values < low) | (values > high)).float().mean()
    if outside > 0.25 or values.min() > (low + high) / 2 or values.max() < (low + high) / 2:
        raise UserError(f'the generator gives values from {values.min():.3g} to '
                        f'{values.max():.3g}: that is not --output_range={low:g},{high:g}')
    if (x == other).all():
        raise UserError('the generator gives the same images whatever the label: take one that is '
                        'conditional, or check --label_input')


# ---------------------------------------------------------------------------------------------
# How learnable a set is: a fixed small network, and the nearest neighbour


def fit_probe(data, rows, device):
    """Train four convolutions on some images of a Data: 10 epochs, batch 128, Adam 1e-3.

    Images above 64 px are averaged down to about that.
    """
    torch.manual_seed(0)
    layers = [nn.AvgPool2d(max(1, data.image_size // 64), ceil_mode=True)]
    for c_in, c_out in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out),
                   nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                            nn.Linear(128, len(data.classes))).to(
        device, memory_format=torch.channels_last)
    adam = torch.optim.Adam(network.parameters(), 1e-3)
    loss_of = nn.functional.binary_cross_entropy_with_logits if data.multilabel \
        else nn.functional.cross_entropy
    batches = Batches(data, rows, min(128, len(rows)), device)
    progress = Progress(10 * len(batches), 'steps of the probe')
    for epoch in range(10):
        for step, (x, y) in enumerate(batches.epoch(epoch)):
            known = {'weight': (y >= 0).float()} if data.multilabel else {}     # -1: not known
            loss_of(network(x), y, **known).backward()
            adam.step()
            adam.zero_grad()
            progress.update(epoch * len(batches) + step)
    progress.close()
    return network.eval()


def auroc(scores, labels):
    """Area under the ROC curve by Mann and Whitney's statistic, ties counted half, in float64.

    scores (n,), labels (n,) of bool; None where all labels are the same.
    """
    if not labels.any() or labels.all():
        return None
    negative, positive = np.sort(scores[~labels].astype(np.float64)), scores[labels]
    below, upto = (np.searchsorted(negative, positive, side) for side in ('left', 'right'))
    return float((below + upto).mean() / 2 / len(negative))


@torch.no_grad()
def grade(predict, data, rows, device):
    """Per cent right of predict(x) -> scores (B, classes); with several labels the mean AUC."""
    batches = Batches(data, rows, 200, device, shuffle=False)
    scores = torch.cat([predict(x).float() for x, _ in batches.epoch()]).cpu().numpy()
    labels = data.labels[np.asarray(rows)]
    if not data.multilabel:
        return 100 * (scores.argmax(1) == labels).mean().item()
    areas = [auroc(score[label >= 0], label[label >= 0] == 1)
             for score, label in zip(scores.T, labels.T)]
    areas = [area for area in areas if area is not None]
    if not areas:
        raise UserError(f'--probe: no label is in some of the {len(rows)} images tested and not in '
                        'others: make more, or leave --probe out')
    return 100 * float(np.mean(areas))


@torch.no_grad()
def nearest_neighbour(data, rows, device):
    """predict(x): the labels of the nearest of some images of a Data, by pixels."""
    pool = nn.AvgPool2d(max(1, data.image_size // 64), ceil_mode=True)
    batches = Batches(data, rows, 200, device, shuffle=False)
    known = torch.cat([pool(x).flatten(1) for x, _ in batches.epoch()])
    labels = conditions(torch.from_numpy(data.labels[rows]).to(device), len(data.classes))
    return lambda x: labels[torch.cdist(pool(x).flatten(1), known).argmin(1)]


def probe(data, device):
    """Train on nine tenths of a Data, test on the rest: what --probe writes into meta.json."""
    train, test = stratified_split(data.labels, 0.9, 0)
    return {'network': grade(fit_probe(data, train, device), data, test, device),
            'nearest_neighbour': grade(nearest_neighbour(data, train, device), data, test, device),
            'measure': 'mean AUC' if data.multilabel else 'accuracy', 'n_train': len(train),
            'n_test': len(test)}


def probe_against(data, args, device):
    """Probes of a Data and of the real images that its generator learned, each on the other."""
    real = read_by(args, args.source)
    test = read_by(args, args.source, 'test') or real
    some = np.sort(np.argsort(philox(0, CHOICE, count=len(real)))[:len(data)])
    made_network = fit_probe(data, range(len(data)), device)
    real_network = fit_probe(real, some, device)
    return {'generated_to_real': grade(made_network, test, range(len(test)), device),
            'real_to_generated': grade(real_network, data, range(len(data)), device),
            'real_to_real': grade(real_network, test, range(len(test)), device)}


# ---------------------------------------------------------------------------------------------
# Writing a data set


def write_noise(out, num_images, num_classes, image_size, seed, mode='uniform', multilabel=False,
                **how):
    """Gaussian noise with random labels, as a data set in the folder `out`."""
    if mode == 'permute':
        raise UserError('--label_mode permute: noise has no true labels; take balanced')
    if num_images < num_classes and not multilabel:
        raise UserError(f'--num_images {num_images} cannot hold {num_classes} classes: raise it')
    labels = draw_labels(seed, num_images, num_classes, mode, multilabel=multilabel)
    chunk = max(1, (32 << 20) // (image_size * image_size * 3))
    chunks = (noise_images(seed, start, min(chunk, num_images - start), image_size)
              for start in range(0, num_images, chunk))
    meta = {'kind': 'noise', 'seed': seed, 'mean': [127.5 / 255] * 3, 'std': [32 / 255] * 3,
            'classes': [str(k) for k in range(num_classes)], 'image_size': image_size}
    return write_set(out, meta, labels, chunks, **how)


def write_random_labels(out, source, seed, mode='uniform', label_noise=1.0, **how):
    """New labels for the images of `source`, a Data, and a reference to those images."""
    labels = redraw_labels(source.labels, len(source.classes), seed, mode, label_noise)
    meta = {'kind': 'random_labels', 'seed': seed, 'mean': source.mean, 'std': source.std,
            'classes': source.classes, 'image_size': source.image_size, 'label_mode': mode,
            'label_noise': label_noise, 'source': source.origin}
    chunks = (source.get(range(start, min(start + 256, len(labels))))
              for start in range(0, len(labels), 256))
    return write_set(out, meta, labels, chunks, reference=source, **how)


def generated_set(args, device):
    """What --generator makes: (labels, class names, size, images to make at once, make).

    make(start, count) gives the images of a slice, uint8 (count, size, size, 3).
    """
    n, classes, size, seed = args.num_images, args.num_classes, args.image_size or 32, args.seed
    labels, names = draw_labels(seed, n, classes, 'balanced'), [str(k) for k in range(classes)]
    if args.generator in (*FAMILIES, 'mixed'):
        if args.multilabel:
            shares = np.resize(list(CHEXPERT.values()), classes)
            labels = (uniforms(seed, LABELS, 0, n, classes) < shares).astype(np.uint8)
            names = list(CHEXPERT) if classes == len(CHEXPERT) else names
        images = Procedural(args.generator, labels, classes, size, seed, args.difficulty,
                            args.systems_per_class or (8 if classes < 1000 else 1), device)
        return labels, names, size, images.chunk * torch.get_num_threads(), images.images
    low, high, z = 0, 1, ('normal', 1)
    path = Path(args.generator)
    if args.generator == 'train':
        source = read_by(args, args.source)
        path = Path(f'{Path(args.out)}.generator')
        train_generator(source, path, args.generator_steps, args.time_limit, seed, device)
        path /= 'generator.pt'
    trained = path.suffix == '.pt' and not args.generator_code      # by --generator train
    if trained:
        state = load_generator(path)
        names, size, rows = state['classes'], state['size'], state['labels'].numpy()
        if args.image_size not in (None, size):
            raise UserError(f'{path} draws {size} px: leave --image_size {args.image_size} out')
        f, z_dim = trained_flow(state, device), 3 * size * size
        labels = draw_labels(seed, n, len(names), 'balanced')
        if rows.ndim == 2:              # vectors of labels that the source has
            labels = rows[(philox(seed, LABELS, count=n) % np.uint64(len(rows))).astype(np.int64)]
    else:
        f, z_dim, z = users_generator(args, device), args.z_dim, (args.z_dist, args.truncation)
        low, high = map(float, args.output_range.split(','))

        # A program may know no other number of images than 64.
        labels_64, z_64 = np.resize(labels, 64), latents(seed, 0, 64, z_dim, *z)
        check_generator(f, z_64, labels_64, classes, low, high, device)

    def make(start, count):
        b = count if trained else 64
        y = np.resize(labels[start:start + count], (b, *labels.shape[1:]))
        return network_images(f, latents(seed, start, b, z_dim, *z), y, low, high, size,
                              device)[:count]

    return labels, names, size, 64, make


def write_generated(out, args, device, force=False, **how):
    """Generated images and the labels that they were made for, as a data set in the folder."""
    if 'num_classes' in used_settings(args, 'generated') and not args.multilabel \
            and args.num_images < args.num_classes:
        raise UserError(f'--num_images {args.num_images} cannot hold {args.num_classes} classes: '
                        'raise it')
    check_out(out, force)
    labels, names, size, chunk, make = generated_set(args, device)
    meta = {'kind': 'generated', 'seed': args.seed, 'classes': names, 'image_size': size,
            'generator': args.generator, 'device': device.type}
    if args.generator in (*FAMILIES, 'mixed'):
        meta['difficulty'] = args.difficulty
    chunks = (make(start, min(chunk, len(labels) - start))
              for start in range(0, len(labels), chunk))
    return write_set(out, meta, labels, chunks, force=force, **how)


def write_set(out, meta, labels, chunks, form='array', force=False, reference=None, test=None):
    """Stream chunks of images (uint8, n x H x W x 3) and their labels into the folder `out`.

    form: 'array' writes images.npy (none where `reference` is a Data that has the images) and
    labels.npy; 'folder' a tree of PNG files, a folder for each class. meta.json and sheet.png
    are written beside them; meta['probe'] is what test(Data) makes of the set. Returns images/s.
    """
    if form == 'folder' and labels.ndim == 2:
        raise UserError('--format folder has one class for each image: leave out --multilabel')
    if form == 'folder':                # so that the order of the folders is that of the classes
        width = len(str(len(meta['classes']) - 1))
        meta['classes'] = [name.zfill(width) if name.isdigit() else name
                           for name in meta['classes']]
        reference = None                # a tree has its images itself
    if test and not len(stratified_split(labels, 0.9, 0)[1]):
        raise UserError(f'--probe: {len(labels)} images of {len(meta["classes"])} classes are too '
                        'few: take more')
    shape = (len(labels), meta['image_size'], meta['image_size'], 3)
    meta = {**meta, 'num_images': len(labels), 'multilabel': labels.ndim == 2, 'format': form}
    progress, began = Progress(len(labels), 'images'), time.time()
    with new_folder(out, force) as folder:
        digest, shown, done = hashlib.sha256(), [], 0
        counts = np.zeros((3, 256), np.int64)
        arrays = form == 'array' and not reference
        with open(folder / 'images.npy' if arrays else os.devnull, 'wb') as images:
            np.lib.format.write_array_header_1_0(
                images, {'descr': '|u1', 'fortran_order': False, 'shape': shape})
            for chunk in chunks:
                shown += list(chunk[:max(0, 100 - len(shown))])
                if 'mean' not in meta:
                    counts += [np.bincount(c, minlength=256) for c in chunk.reshape(-1, 3).T]
                digest.update(chunk.tobytes())
                images.write(chunk.tobytes())
                if form == 'folder':
                    write_pngs(folder, chunk, labels, done, meta['classes'])
                done += len(chunk)
                progress.update(done)
                if reference and done >= 100:
                    break
        progress.close()
        rate = done / (time.time() - began)
        if form == 'array':
            np.save(folder / 'labels.npy', labels)
        meta['sha256'] = {'images': reference.sha256() if reference else digest.hexdigest(),
                          'labels': hashlib.sha256(labels.tobytes()).hexdigest()}
        if 'mean' not in meta:
            mean = counts @ np.arange(256) / counts.sum(1)
            variance = counts @ np.arange(256) ** 2 / counts.sum(1) - mean ** 2
            meta['mean'] = (mean / 255).tolist()
            meta['std'] = (np.sqrt(np.maximum(variance, 1)) / 255).tolist()
        contact_sheet(np.stack(shown), labels[:len(shown)], meta).save(folder / 'sheet.png')
        meta['command'] = shlex.join(['python', Path(sys.argv[0]).name, *sys.argv[1:]])
        meta['versions'] = {'python': sys.version.split()[0], 'numpy': np.__version__,
                            'pillow': Image.__version__, 'torch': torch.__version__}
        write_file(folder / 'meta.json', json.dumps(meta, indent=1) + '\n')
        if test:
            meta['probe'] = test(read_written(folder, None, 'train'))
            write_file(folder / 'meta.json', json.dumps(meta, indent=1) + '\n')
    return rate


def write_pngs(folder, chunk, labels, start, classes):
    for k, pixels in enumerate(chunk, start):
        target = folder / classes[labels[k]]
        target.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(target / f'{k:06d}.png')


def contact_sheet(images, labels, meta):
    """A labelled PIL image of up to 100 images, in ten columns, sorted by class where possible."""
    order = range(len(images))
    if labels.ndim == 1:
        order = np.argsort(labels, kind='stable')
    size, gap, text = 72, 8, 18
    rows = -(-len(images) // 10)
    sheet = Image.new('RGB', (10 * (size + gap) + gap, rows * (size + text + gap) + gap + 34),
                      'white')
    pen, small = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    what = ', '.join(Path(meta[key]).name for key in ('kind', 'generator', 'difficulty')
                     if key in meta)
    title = f'{what}: {meta["num_images"]:,} images of {meta["image_size"]} px, ' \
            f'{len(meta["classes"])} {"labels" if labels.ndim == 2 else "classes"}, ' \
            f'seed {meta["seed"]}'
    pen.text((gap, 8), title, 'black', ImageFont.load_default(15))
    for place, k in enumerate(order):
        x = gap + place % 10 * (size + gap)
        y = 34 + place // 10 * (size + text + gap)
        resample = Image.NEAREST if images.shape[1] <= size else Image.LANCZOS
        sheet.paste(Image.fromarray(images[k]).resize((size, size), resample), (x, y))
        present = [labels[k]] if labels.ndim == 1 else np.flatnonzero(labels[k] == 1)
        name = ' '.join(' '.join(meta['classes'][c] for c in present).split())
        while pen.textlength(name, small) > size:
            name = name[:-1]
        pen.text((x + size / 2, y + size + 2), name, 'dimgray', small, anchor='ma')
    return sheet


# ---------------------------------------------------------------------------------------------
# Reading a data set


@dataclass
class Data:
    """One split of a data set. Images are uint8 arrays (N, H, W, 3), or files read when needed."""
    name: str                   # what the user called it
    kind: str                   # 'real', 'noise', 'random_labels', 'generated'
    images: object              # array, or list of paths
    labels: np.ndarray          # int64 (N,), or (N, classes) of 0, 1, -1 (not known)
    classes: list
    mean: list                  # of pixels / 255, per channel
    std: list
    image_size: int
    origin: dict                # where it came from: enough to find it again
    studies: np.ndarray = None  # of chest X-rays: 'patient00001/study1' of each image
    zoom: float = 1.0           # shorter side of a file to the side that is cut out of it
    on_device: dict = field(default_factory=dict, repr=False)

    @property
    def multilabel(self):
        return self.labels.ndim == 2

    @property
    def small(self):
        return len(self.labels) * self.image_size ** 2 * 3 <= RESIDENT

    @property
    def resident(self):
        """Whether its images live on the device."""
        return self.small and isinstance(self.images, np.ndarray)

    def __len__(self):
        return len(self.labels)

    @property
    def patients(self):
        """Of each image the patient, who is in one half of a split only; None without studies."""
        return None if self.studies is None else np.array([s.split('/')[0] for s in self.studies])

    def __getitem__(self, item):
        """uint8 (H, W, 3), for torch's DataLoader; item: (index, what crop_box takes or None)."""
        image = self.images[item[0]]
        if not isinstance(self.images, np.ndarray):
            image = read_image(image, self.image_size, self.zoom, item[1])
        return torch.from_numpy(image.copy())

    def get(self, indices):
        """uint8 (len(indices), H, W, 3)."""
        if isinstance(self.images, np.ndarray):
            return self.images[np.asarray(indices)]
        return np.stack([read_image(self.images[i], self.image_size, self.zoom) for i in indices])

    def sha256(self):
        """Of the images, or of the names and sizes of their files where they are not in memory."""
        if isinstance(self.images, np.ndarray):
            return hashlib.sha256(np.ascontiguousarray(self.images)).hexdigest()
        names = [f'{path.parent.name}/{path.name} {path.stat().st_size}' for path in self.images]
        return hashlib.sha256('\n'.join(names).encode()).hexdigest()


def read(name, data_dir='data', split='train', image_size=None, download=False, **chexpert):
    """Data of one split, 'train' or 'test': `name` is one of REAL or the path of a folder.

    None where the set has no test split. image_size: resize real images to it (those of a folder
    to 32 if not given); a written set is never resized. chexpert: `uncertain` and `views`, see
    read_chexpert. UserError for what is missing or broken.
    """
    if name in CIFAR:
        data = read_cifar(name, data_dir, split, download)
    elif name == 'chexpert':
        return read_chexpert(data_dir, split, image_size or 320, **chexpert)
    elif name == 'imagenet':
        return read_imagenet(data_dir, split, image_size or 224)
    elif not Path(name).is_dir():
        raise UserError(f'{name}: neither a folder nor {", ".join(REAL)}, noise, random_labels, '
                        'generated')
    elif (Path(name) / 'meta.json').exists():
        data = read_written(Path(name), data_dir, split)
    else:
        data = read_folder(Path(name), split, image_size or 32)
    if data and image_size and data.image_size != image_size:
        if name not in CIFAR:
            raise UserError(f'{name}: its images have {data.image_size} px, not {image_size}: take '
                            f'--image_size {data.image_size}, or generate it at that size')
        images = [np.asarray(Image.fromarray(x).resize((image_size, image_size), Image.BICUBIC))
                  for x in data.images]
        data = replace(data, images=np.stack(images), image_size=image_size,
                       origin={**data.origin, 'resized': True})
    return data


def read_by(args, name, split='train'):
    """`read` with the flags that the scripts share."""
    return read(name, args.data_dir, split, args.image_size, args.download,
                uncertain=args.uncertain, views=args.views)


def read_written(folder, data_dir, split):
    """A set of write_set; 'test' is None, since unreal data have no test split."""
    meta = read_meta(folder)
    if split != 'train':
        return None
    size = meta['image_size']
    whole = functools.partial(Data, str(folder), meta['kind'], classes=meta['classes'],
                              mean=meta['mean'], std=meta['std'], image_size=size,
                              origin={'name': str(folder.resolve())})
    if meta['format'] == 'folder':
        names = class_names(folder)
        files, places = list_images(folder, names)
        if not set(names) <= set(meta['classes']) or len(files) != meta['num_images']:
            raise UserError(f'{folder} does not hold what meta.json says: generate it again')
        data = whole(files, np.array([meta['classes'].index(name) for name in names])[places])
        if data.small:
            data.images = decode(files, size)
        return data
    labels = load_array(folder / 'labels.npy')
    if hashlib.sha256(labels.tobytes()).hexdigest() != meta['sha256']['labels'] \
            or (labels.ndim == 1 and labels.max() >= len(meta['classes'])):
        raise UserError(f'{folder}/labels.npy is not what meta.json says: generate it again')
    if meta['kind'] == 'random_labels':
        source = read_source(folder, meta, data_dir)
        if len(source) != len(labels):
            raise UserError(f'{folder}/labels.npy does not fit {source.name}: generate it again')
        return replace(source, name=str(folder), kind='random_labels', labels=labels,
                       origin={'name': str(folder.resolve())})
    images = load_array(folder / 'images.npy', mmap_mode='r')
    data = whole(images, labels)
    sound = images.shape == (len(labels), size, size, 3) and images.dtype == np.uint8
    if not sound or (data.resident and data.sha256() != meta['sha256']['images']):
        raise UserError(f'{folder}/images.npy is not what meta.json says: generate it again')
    return data


def read_meta(folder):
    with readable(f'{folder}/meta.json is broken', 'generate the set again'):
        meta = json.loads((folder / 'meta.json').read_text())
        sound = meta['kind'] in USED and meta['format'] in ('array', 'folder') \
            and all(type(meta[k]) is int and meta[k] > 0 for k in ('image_size', 'num_images')) \
            and all(isinstance(name, str) for name in meta['classes']) and len(meta['classes']) \
            and all(len(meta[k]) == 3 and all(math.isfinite(v) for v in meta[k])
                    for k in ('mean', 'std')) and min(meta['std']) > 0
        if meta['format'] == 'array':
            meta['sha256']['labels'], meta['sha256']['images']
            sound = sound and (
                meta['kind'] != 'random_labels' or 'name' in meta['source'])
        if not sound:
            raise ValueError('a value is of the wrong kind')
        return meta


def read_source(folder, meta, data_dir):
    """The images that a set of random labels refers to, looked for under data_dir as well."""
    origin = meta['source']
    for place in dict.fromkeys([origin.get('data_dir'), data_dir]):
        with contextlib.suppress(UserError):
            source = read(origin['name'], place or '.', 'train',
                          meta['image_size'] if origin.get('resized') else None,
                          **origin.get('chexpert', {}))
            if source.sha256() == meta['sha256']['images']:
                return source
    raise UserError(f'{folder}: its images, {origin["name"]} {origin.get("data_dir", "")}, are not '
                    'as they were: give their --data_dir, or generate it again')


def load_array(path, **kwargs):
    with readable(f'{path} is truncated or not an array', 'generate the set again'):
        return np.load(path, allow_pickle=False, **kwargs)


# CIFAR: means and standard deviations of the training images (those that DARTS's code uses; for
# CIFAR-100 those of its own images).
CIFAR = {
    'cifar10': ('cifar-10-batches-py', [0.49139968, 0.48215827, 0.44653124],
                [0.24703233, 0.24348505, 0.26158768]),
    'cifar100': ('cifar-100-python', [0.50707516, 0.48654887, 0.44091784],
                 [0.26733429, 0.25643846, 0.27615047])}


def read_cifar(name, data_dir, split, download=False):
    """CIFAR-10 or -100 in the layout of its python archive, in data_dir or data_dir itself."""
    import torchvision
    official = getattr(torchvision.datasets, name.upper())
    inner, mean, std = CIFAR[name]
    folder = Path(data_dir) / inner
    if not folder.is_dir() and Path(data_dir).name == inner:
        folder = Path(data_dir)
    if not folder.is_dir() and download:
        try:
            with new_folder(folder) as new:             # by one process, whole or not at all
                official(str(new), download=True)
                for file in [*(new / inner).iterdir()]:
                    file.rename(new / file.name)
                (new / inner).rmdir()
                (new / official.filename).unlink(missing_ok=True)
        except Exception as error:
            if not folder.is_dir():                     # else another run has just fetched it
                raise UserError(f'no download ({error}): put {inner}/ into {data_dir}') from None
    if not folder.is_dir():
        raise UserError(f'{name}: no {inner}/ in {data_dir}: give its --data_dir, or --download')
    key = 'labels' if name == 'cifar10' else 'fine_labels'
    files = official.train_list if split == 'train' else official.test_list
    parts, unusual = [], []
    for file, md5 in files:
        images, labels, digest = read_cifar_batch(folder / file, key, int(name[5:]))
        parts.append((images, labels))
        if digest != md5:
            unusual.append(file)
    images, labels = (np.concatenate(part) for part in zip(*parts))
    expected = 50000 if split == 'train' else 10000
    if unusual or len(images) != expected:
        print(f'warning: {folder}: {len(images):,} {split} images; '
              f'{", ".join(unusual) or "no file"} not as officially published', file=sys.stderr)
    names = load_pickle(folder / official.meta['filename']).get(official.meta['key'])
    names = [n.decode(errors='replace') if isinstance(n, bytes) else n
             for n in (names if isinstance(names, list) else ())]
    if len(names) != int(name[5:]) or not all(isinstance(n, str) for n in names):
        raise UserError(f'{folder}/{official.meta["filename"]} names no classes: unpack it again')
    return Data(name, 'real', images, labels, names, mean, std, 32,
                {'name': name, 'data_dir': str(Path(data_dir).resolve())})


def read_cifar_batch(path, key, num_classes):
    """(uint8 (n, 32, 32, 3), int64 (n,), md5) of one pickle."""
    batch = load_pickle(path)
    data, labels = batch.get('data'), batch.get(key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,) \
            or not len(data):
        raise UserError(f'{path}: "data" is not an array of bytes, n x 3072: not a CIFAR file')
    if not isinstance(labels, list) or len(labels) != len(data) \
            or not all(type(k) is int and 0 <= k < num_classes for k in labels):
        raise UserError(f'{path}: "{key}" is not a list of {len(data)} classes: not a CIFAR file')
    images = np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, np.array(labels, np.int64), hashlib.md5(path.read_bytes()).hexdigest()


class PlainUnpickler(pickle.Unpickler):
    """Admits numpy arrays and plain types only: a pickle from elsewhere could run any code."""
    def find_class(self, module, name):
        if (module, name) in {('numpy.core.multiarray', '_reconstruct'), ('numpy', 'ndarray'),
                              ('numpy._core.multiarray', '_reconstruct'), ('numpy', 'dtype'),
                              ('_codecs', 'encode')}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f'{module}.{name} is not allowed')


def load_pickle(path):
    """A dictionary with text keys; those of Python 2, as in the official files, as well."""
    with readable(f'{path} is no CIFAR file', 'unpack it again'), open(path, 'rb') as file:
        entries = PlainUnpickler(file, encoding='bytes').load()
        return {k.decode(errors='replace') if isinstance(k, bytes) else k: v
                for k, v in entries.items()}


REAL = [*CIFAR, 'imagenet', 'chexpert']


def read_imagenet(data_dir, split, image_size):
    """ImageNet as train/<synset>/ and val/<synset>/ in data_dir, or in its folder imagenet/."""
    places = [Path(data_dir), Path(data_dir) / 'imagenet']
    found = [place for place in places if all((place / part).is_dir() for part in ('train', 'val'))]
    if not found:
        raise UserError(f'imagenet: no train/ and val/ in {places[0]} or {places[1]}: give its '
                        '--data_dir')
    data = read_folder(found[0], split, image_size, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    origin = {'name': 'imagenet', 'data_dir': str(Path(data_dir).resolve()), 'resized': True}
    return replace(data, name='imagenet', origin=origin)


def read_chexpert(data_dir, split, image_size, uncertain='mixed', views='frontal', table=None):
    """Chest X-rays in CheXpert's layouts (arXiv 1901.07031): train.csv, or valid.csv for 'test'.

    uncertain: what -1.0 becomes: ones, zeros, ignore (-1: left out of the loss and of metrics), or
    mixed, the later practice: ones for Atelectasis and Edema, zeros else. Blank cells are zeros.
    views: frontal, or all. table: another CSV, that of the test set, with a column Study. Pixels
    are normalised with mean 0.5 and deviation 0.25 in every split, our own choice. UserError names
    the file, line or column that is not as it should be.
    """
    root = next((Path(data_dir) / place for place in CHEXPERT_FOLDERS
                 if (Path(data_dir) / place / 'train.csv').is_file()), None)
    if root is None and table is None:
        raise UserError(f'chexpert: no train.csv in {data_dir}, nor in its '
                        f'{", ".join(CHEXPERT_FOLDERS[1:])}: give its --data_dir')
    path = Path(table) if table else root / ('train.csv' if split == 'train' else 'valid.csv')
    paths, labels = read_chexpert_table(path, uncertain)
    files, kept = chexpert_files(root or Path(data_dir), path, paths, views)
    labels, studies = labels[kept], np.array(['/'.join(f.parts[-3:-1]) for f in files])
    if not files:
        raise UserError(f'{path}: no {views} view in it: take --views all')
    origin = {'name': 'chexpert', 'data_dir': str(Path(data_dir).resolve()), 'resized': True,
              'chexpert': {'uncertain': uncertain, 'views': views}}
    data = Data('chexpert', 'real', files, labels, list(CHEXPERT), [0.5] * 3, [0.25] * 3,
                image_size, origin, studies)
    if split == 'train' and (root / 'valid.csv').is_file():
        others = read_chexpert_table(root / 'valid.csv', uncertain)[0]
        both = set(data.patients) & {p for path in others for p in path.split('/')}
        if both:
            print(f'warning: {root}: patients in train.csv and in valid.csv: '
                  f'{", ".join(sorted(both)[:5])}', file=sys.stderr)
    if data.small:
        data.images = decode(files, image_size)
    return data


CHEXPERT_FOLDERS = ['.', 'CheXpert-v1.0-small', 'CheXpert-v1.0',
                    'CheXpert-v1.0 batch 1 (validate & csv)']


def read_chexpert_table(path, uncertain):
    """(column Path or Study, int8 labels (N, 14)) of a CSV, its columns found by their names."""
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(f'{path} is missing: unpack CheXpert\'s CSV files again') from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f'{path} is no CSV file ({error}): unpack it again') from None
    where = next((name for name in ('Path', 'Study') if rows and name in rows[0]), None)
    missing = [name for name in CHEXPERT if rows and name not in rows[0]]
    if not where or missing:
        raise UserError(f'{path}: no column {", ".join(missing) or "Path"}: CheXpert\'s names are '
                        'needed' if rows else f'{path}: no rows in it: unpack it again')
    one = {'ones': 1, 'zeros': 0, 'ignore': -1}
    labels = np.zeros((len(rows), len(CHEXPERT)), np.int8)
    for n, row in enumerate(rows):
        for k, name in enumerate(CHEXPERT):
            try:
                value = float(row[name].strip() or 0)
                if value not in (0, 1, -1) or not row[where]:
                    raise ValueError
            except (AttributeError, ValueError):        # no text: the line is cut short
                raise UserError(f'{path}, line {n + 2}: {where} {row[where]!r}, {name} '
                                f'{row[name]!r}: labels are 1.0, 0.0, -1.0 or blank') from None
            if value == -1:
                value = one[uncertain] if uncertain != 'mixed' else name in ('Atelectasis', 'Edema')
            labels[n, k] = value
    return [row[where] for row in rows], labels


def chexpert_files(root, table, paths, views):
    """(files, rows) of the wanted views that a CSV names, a Study standing for all of its views.

    What precedes train/, valid/ or test/ in a path is of another machine. In the full download
    the patients of train/ are spread over the folders of the other batches.
    """
    inside = [re.sub(r'^(.*/)?(?=(train|valid|test)/)', '', path) for path in paths]
    owners = {patient.name: patient.parent
              for patient in root.parent.glob('CheXpert-v1.0 batch */patient*')} \
        if root.name.startswith('CheXpert-v1.0 batch') else {}
    studies = not any(Path(path).suffix for path in inside[:3])
    places = [root, table.parent, root.parent]

    def of_batch(path):
        patient = path.split('/')[1] if path.startswith('train/') else None
        return owners[patient] / path[6:] if patient in owners else None

    tried = [(of_batch(path) or place / path, place) for place in places for path in inside[:3]]
    place = next((place for file, place in tried if file.exists()), None)
    if place is None:
        looked = ', '.join(dict.fromkeys(str(file) for file, _ in tried))
        raise UserError(f'{table}: none of its first files is there; looked at {looked}: give the '
                        'right --data_dir')
    files, rows = [], []
    for row, path in enumerate(inside):
        file = of_batch(path) or place / path
        for view in sorted(file.glob('view*')) if studies else [file]:
            if views == 'all' or 'frontal' in view.name:
                files.append(view)
                rows.append(row)
    return files, np.array(rows, int)


EXTENSIONS = {'.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm', '.pgm'}


def read_folder(root, split, image_size, mean=None, std=None):
    """A tree with a folder for each class: root/train and root/val (or test), or root alone.

    A tree without val/ has no test split. Resident sets are decoded at once. Above 64 px images
    are resized to 8/7 of the size and their middle is cut out, as 256 and 224 px of ImageNet's.
    """
    train = root / 'train' if (root / 'train').is_dir() else root
    test = next((root / name for name in ('val', 'test')
                 if train != root and (root / name).is_dir()), None)
    classes = class_names(train)
    differ = sorted(set(classes) ^ set(class_names(test))) if test else ()
    if differ:
        raise UserError(f'{test} and {train} differ in their classes: {", ".join(differ[:5])}: '
                        'give both the same folders')
    if split == 'test' and not test:
        return None
    files, labels = list_images(test if split == 'test' else train, classes)
    data = Data(str(root), 'real', files, labels, classes, mean, std, image_size,
                {'name': str(root.resolve()), 'resized': True},
                zoom=8 / 7 if image_size > 64 else 1)
    if data.small and (data.zoom == 1 or split == 'test'):      # else crops of the whole image
        data.images = decode(files, image_size, data.zoom)
    if mean is None:
        data.mean, data.std = mean_and_std(tuple(list_images(train, classes)[0]), image_size)
    return data


@functools.lru_cache(4)
def mean_and_std(files, image_size):
    """Of pixels / 255, by channel, over at most 2,000 training images, few in memory at a time."""
    chosen = [files[k] for k in np.linspace(0, len(files) - 1, min(len(files), 2000)).astype(int)]
    sums = np.zeros((2, 3))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(chosen), 32):
            for pixels in pool.map(lambda f: read_image(f, image_size), chosen[start:start + 32]):
                pixels = pixels / 255
                sums += pixels.mean((0, 1)), (pixels ** 2).mean((0, 1))
    mean, square = sums / len(chosen)
    return mean.tolist(), np.sqrt(np.maximum(square - mean ** 2, 1 / 255 ** 2)).tolist()


def list_images(folder, classes):
    """(paths, int64 labels) of all images in the folders of the classes."""
    files, labels = [], []
    for k, name in enumerate(classes):
        found = sorted(p for p in (folder / name).rglob('*') if p.suffix.lower() in EXTENSIONS)
        if not found:
            raise UserError(f'{folder / name}: no image in this class folder: put some in, or '
                            'remove the class from every split')
        files += found
        labels += [k] * len(found)
    return files, np.array(labels, np.int64)


def class_names(folder):
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith('.'))
    if not names:
        raise UserError(f'{folder}: no class folders in it: give each class a folder of images')
    return names


def decode(files, image_size, zoom=1):
    """All files as uint8 (N, H, W, 3), several at a time."""
    images = np.empty((len(files), image_size, image_size, 3), np.uint8)
    progress = Progress(len(files), 'images')
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for k, pixels in enumerate(pool.map(lambda f: read_image(f, image_size, zoom), files)):
            images[k] = pixels
            progress.update(k + 1)
    return images


def read_image(path, image_size, zoom=1, crop=None):
    """uint8 (image_size, image_size, 3): the middle, or what `crop_box` makes of `crop`, resized.

    zoom: how much longer than the middle that is cut out the shorter side is. Grey becomes RGB;
    16-bit images are scaled by the range of their type, floating-point ones by their own range.
    """
    try:
        with Image.open(path) as image:
            w, h = image.size
            if image.getexif().get(274, 1) > 4:             # lies on its side until it is turned
                w, h = h, w
            part = 1 / zoom
            if crop is not None:
                left, top, width, height = crop_box(torch.tensor([crop]), w / h)[0].tolist()
                part = min(width * w, height * h) / min(w, h)
            # A JPEG is decoded at a half, a quarter or an eighth where that leaves enough.
            image.draft('RGB', [math.ceil(2 * image_size / part * side / min(w, h))
                                for side in image.size])
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith('I') or image.mode == 'F':
                pixels = np.asarray(image).astype(np.float64)
                low, high = (0, 65535) if image.mode != 'F' and pixels.max() < 65536 \
                    else (pixels.min(), pixels.max())
                image = Image.fromarray(np.uint8(np.rint(
                    np.clip((pixels - low) / max(high - low, 1e-12), 0, 1) * 255)))
            image = image.convert('RGB')
            w, h = image.size
            if crop is not None:
                box = left * w, top * h, (left + width) * w, (top + height) * h
            else:                   # whole pixels, as if the resized image had been cut
                scale = round(image_size * zoom) / min(w, h)
                wide, high = (max(image_size, round(side * scale)) for side in (w, h))
                left, top = (wide - image_size) // 2, (high - image_size) // 2
                box = (left * w / wide, top * h / high, (left + image_size) * w / wide,
                       (top + image_size) * h / high)
            return np.asarray(image.resize((image_size, image_size), Image.BICUBIC, box))
    except Exception as error:
        raise UserError(f'{path}: not a readable image ({error}): mend or remove it') from None


# ---------------------------------------------------------------------------------------------
# From a data set to batches


def used_settings(args, kind):
    """Names of the SETTINGS that `kind` makes something of."""
    used = USED.get(kind, set())
    if kind == 'generated':
        kind = args.generator
        ours = kind.endswith('.pt') and not getattr(args, 'generator_code', None)
        used = used | USED_BY.get(kind, set() if ours else USED_BY['FILE'])
    if kind == 'chexpert' or ('source' in used and args.source == 'chexpert'):
        used = used | {'uncertain', 'views'}
    return used


def refuse_unused(args, kind):
    """UserError for a setting of unreal data that `kind` would pass over in silence."""
    for name in sorted(SETTINGS.keys() - used_settings(args, kind)):
        by_quick = name == 'num_images' and getattr(args, 'quick', False)
        if getattr(args, name, SETTINGS[name]) != SETTINGS[name] and not by_quick:
            raise UserError(f'--{name} (or a --like or --preset that sets it) means nothing for '
                            f'{kind}: leave it out')


def find_or_make(args):
    """The training split of --data; an unreal set that is missing is generated first.

    args: the data flags of search.py and retrain.py. What is made lies under data/, in a folder
    whose name holds all that it depends on. Of several runs that need it, one makes it.
    """
    refuse_unused(args, args.data)
    folder, size = Path('data'), args.image_size or 32
    if args.data == 'noise':
        mode = '' if args.label_mode == 'uniform' else f'-{args.label_mode}'
        folder /= (f'noise-{args.num_images}x{size}px-{args.num_classes}classes{mode}'
                   f'{"-multilabel" * args.multilabel}-seed{args.data_seed}')
        make = functools.partial(write_noise, folder, args.num_images, args.num_classes, size,
                                 args.data_seed, args.label_mode, args.multilabel)
    elif args.data == 'random_labels':
        source = read_by(args, args.source)
        folder /= (f'random_labels-{Path(args.source).name}-{source.sha256()[:8]}'
                   f'-{source.image_size}px-{args.label_mode}-{args.label_noise:g}'
                   f'{f"-{args.uncertain}" * (args.source == "chexpert")}-seed{args.data_seed}')
        make = functools.partial(write_random_labels, folder, source, args.data_seed,
                                 args.label_mode, args.label_noise)
    elif args.data == 'generated':
        if args.generator not in (*FAMILIES, 'mixed'):
            raise UserError(f'--generator {args.generator}: make this set with generate_data.py, '
                            'and give its folder as --data')
        folder /= (f'generated-{args.generator}-{args.difficulty}-{args.num_images}x{size}px-'
                   f'{args.num_classes}classes'
                   + f'-systems{args.systems_per_class}' * (args.systems_per_class is not None)
                   + f'{"-multilabel" * args.multilabel}-seed{args.data_seed}')
        settings = argparse.Namespace(**{**vars(args), 'seed': args.data_seed})
        make = functools.partial(write_generated, folder, settings, torch.device('cpu'))
    else:
        data = read_by(args, args.data)
        if data.image_size < 8:
            raise UserError(f'{args.data}: {data.image_size} px are too few: 8 or more needed')
        return data
    if not folder.exists() and not world()[0]:
        print(f'making {folder}', file=sys.stderr)
        try:
            make()
        except UserError:
            if not folder.exists():             # else another run has just made it
                raise
    if world()[1] > 1:
        torch.distributed.barrier()
    return read(str(folder), args.data_dir)


def stratified_split(labels, fraction, seed, patients=None):
    """Two sorted index arrays: a share `fraction` of every class, drawn by seed, and the rest.

    Of a class with n images the first gets n * fraction, as floating point has it (.07 of 100 are
    a little more than 7), rounded up. Images with several labels are split without regard to them.
    patients (N,): all images of one are in one of the two, and the share is of patients.
    """
    if patients is not None:
        names, whose = np.unique(patients, return_inverse=True)
        first = np.isin(whose, stratified_split(np.zeros(len(names), int), fraction, seed)[0])
        return np.flatnonzero(first), np.flatnonzero(~first)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, len(labels)])))
    groups = labels if labels.ndim == 1 else np.zeros(len(labels), np.int64)
    order = np.lexsort((rng.random(len(labels)), groups))
    grouped = groups[order]
    rank = np.arange(len(labels)) - np.searchsorted(grouped, grouped)
    first = np.ceil((rank + 1) * fraction) > np.ceil(rank * fraction)
    return np.sort(order[first]), np.sort(order[~first])


class Batches:
    """Normalised batches of some images of a Data, every epoch in an order of its own.

    Yields x (B, 3, H, W) float32, channels_last, and y, int64 (B,) or float32 (B, classes). All
    random draws depend on (seed, epoch) alone, so an epoch can be entered at any step. Of several
    processes each gets its share of every batch of `batch_size`.
    augment: 'standard' is RandomCrop (padding 4 at 32 px) and flip; 'imagenet' a crop of random
    size, flip and colours; 'affine' a slight turn, shift and zoom; 'affine_flip' that and a flip;
    'auto' what suits the images, and nothing for noise. cutout: side of a square that is blanked
    (arXiv 1708.04552), 0 for none.
    Training drops the last incomplete batch, so that shapes never change; with shuffle=False
    every image comes once, in order, in batches of `batch_size` in each process.
    """
    def __init__(self, data, indices, batch_size, device, augment='none', cutout=0, seed=0,
                 shuffle=True, workers=2):
        rank, processes = world()
        if len(indices) < batch_size and shuffle:
            raise UserError(f'--batch_size {batch_size} is more than the {len(indices)} images of '
                            f'its split of {data.name}: take a smaller one')
        if batch_size % processes and shuffle:
            raise UserError(f'--batch_size {batch_size} is no multiple of the {processes} '
                            'processes: take one')
        self.data, self.indices, self.batch_size = data, np.asarray(indices), batch_size
        self.part = slice(0, batch_size)
        if shuffle:
            self.part = slice(rank * batch_size // processes, (rank + 1) * batch_size // processes)
        else:
            self.indices = self.indices[rank::processes]
        self.device, self.augment, self.cutout, self.seed = device, augment, cutout, seed
        self.shuffle, self.workers = shuffle, workers
        if augment == 'auto':
            self.augment = 'none' if data.kind == 'noise' else 'affine' if data.multilabel \
                else 'imagenet' if data.image_size > 64 else 'standard'
        self.mean = torch.tensor(data.mean, device=device) * 255
        self.scale = 1 / (torch.tensor(data.std, device=device) * 255)
        labels = torch.from_numpy(np.ascontiguousarray(data.labels))
        self.labels = (labels.float() if data.multilabel else labels).to(device)
        if data.resident and str(device) not in data.on_device:
            data.on_device[str(device)] = torch.from_numpy(np.array(data.images)).to(device)

    def __len__(self):
        n = len(self.indices)
        return n // self.batch_size if self.shuffle else -(-n // self.batch_size)

    def epoch(self, epoch=0, start=0):
        """Batches start, start + 1, ... of an epoch."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
        n, step = len(self.indices), self.batch_size
        order = torch.from_numpy(self.indices[rng.permutation(n)] if self.shuffle
                                 else self.indices)
        random = self.augment != 'none' or self.cutout
        u = torch.from_numpy(rng.random((n if random else 0, 11), np.float32))
        order, draws = order.to(self.device), u.to(self.device)
        slices = [slice(k * step + self.part.start, k * step + self.part.stop)
                  for k in range(start, len(self))]
        crops = u[:, 3:7] if self.augment == 'imagenet' else None
        for part, x in zip(slices, self.pixels(order, slices, crops)):
            yield self.prepared(x, draws[part]), self.labels[order[part]]

    def prepared(self, x, u):
        """x: uint8 (B, H, W, 3), u: (B, 11) from 0 to 1, whose columns are a flip, the place of
        cutout (2), a shift or crop (4) and colours (4). Returns (B, 3, H, W), normalised."""
        size, augment = self.data.image_size, self.augment
        if augment == 'standard':
            x = crop_and_flip(x, (u[:, 3:5] * (2 * (size // 8) + 1)).long(), u[:, 0] < 0.5,
                              size // 8)
        elif augment != 'none':
            x = x.permute(0, 3, 1, 2).float()
            if augment == 'imagenet' and isinstance(self.data.images, np.ndarray):
                left, top, width, height = crop_box(u[:, 3:7]).unbind(1)
                x = warped(x, width, 0 * width, 2 * left + width - 1,
                           0 * width, height, 2 * top + height - 1)
            elif augment != 'imagenet':     # 5 degrees, 5% of the side, 5% of the size: our choice
                turn, dx, dy, zoom = (2 * u[:, 3:7] - 1).unbind(1)
                c, s = (f(math.pi / 36 * turn) * (1 + zoom / 20) for f in (torch.cos, torch.sin))
                x = warped(x, c, -s, dx / 10, s, c, dy / 10)
            if augment in ('imagenet', 'affine_flip'):
                x = torch.where((u[:, 0] < 0.5).view(-1, 1, 1, 1), x.flip(3), x)
            if augment == 'imagenet':
                x = recoloured(x, *u[:, 7:11].unbind(1))
            x = x.permute(0, 2, 3, 1)
        x = ((x.float() - self.mean) * self.scale).permute(0, 3, 1, 2)
        if self.cutout:
            x = x * square_mask((u[:, 1:3] * size).long(), self.cutout, size).unsqueeze(1)
        return x

    def pixels(self, order, slices, crops):
        """uint8 (B, H, W, 3) on the device for each slice of `order`."""
        if self.data.resident:
            images = self.data.on_device[str(self.device)]
            for part in slices:
                yield images[order[part]]
            return
        order = order.cpu()
        none = [None] * self.batch_size
        batches = (list(zip(order[part].tolist(), none if crops is None else crops[part].tolist()))
                   for part in slices)
        loader = torch.utils.data.DataLoader(
            self.data, batch_sampler=batches, num_workers=self.workers,
            pin_memory=self.device.type == 'cuda', generator=torch.Generator())
        try:
            for x in loader:
                yield x.to(self.device, non_blocking=True)
        except UserError as error:              # of a worker: its text ends with the message
            raise UserError(str(error).strip().splitlines()[-1].split('UserError: ')[-1]) \
                from None


def crop_and_flip(x, offsets, flips, padding):
    """x: uint8 (B, H, W, 3); offsets (B, 2) into x padded with black; flips (B,) 0 or 1."""
    b, h, w, _ = x.shape
    x = torch.nn.functional.pad(x, (0, 0, padding, padding, padding, padding))
    rows = offsets[:, :1] + torch.arange(h, device=x.device)
    columns = torch.arange(w, device=x.device)
    columns = torch.where(flips.unsqueeze(1) == 1, w - 1 - columns, columns) + offsets[:, 1:]
    images = torch.arange(b, device=x.device)
    return x[images[:, None, None], rows[:, :, None], columns[:, None, :]]


def crop_box(u, aspect=1.0):
    """(B, 4): left, top, width, height in shares of an image whose width / height is `aspect`.

    8 to 100% of its area in a shape of 3:4 to 4:3 (arXiv 1409.4842); what would stick out is cut
    off, where torchvision's RandomResizedCrop draws again. u: (B, 4) from 0 to 1.
    """
    area, shape = 0.08 + 0.92 * u[:, 0], (4 / 3) ** (2 * u[:, 1] - 1)
    width = (area * shape / aspect).sqrt().clamp(max=1)
    height = (area / shape * aspect).sqrt().clamp(max=1)
    return torch.stack([u[:, 2] * (1 - width), u[:, 3] * (1 - height), width, height], 1)


def warped(x, *rows):
    """x (B, C, H, W) by a matrix of two rows, (B,) each, from output to input, -1 to 1; bilinear,
    and black outside."""
    theta = torch.stack(rows, 1).view(-1, 2, 3)
    grid = nn.functional.affine_grid(theta, x.shape, align_corners=False)
    return nn.functional.grid_sample(x, grid, align_corners=False)


def recoloured(x, brightness, contrast, saturation, hue):
    """x (B, 3, H, W) from 0 to 255 with factors 0.6 to 1.4 and the hue turned by up to 0.2 of the
    circle, in this order, as ColorJitter(.4, .4, .4, .2). Arguments: (B,) from 0 to 1.

    All but the contrast are one matrix for each image: the hue turns about the grey axis.
    """
    eye, grey = torch.eye(3, device=x.device), torch.tensor([0.299, 0.587, 0.114], device=x.device)
    b, k, s = ((0.6 + 0.8 * u)[:, None, None] for u in (brightness, contrast, saturation))
    c, d = (f(0.4 * math.pi * (2 * hue - 1))[:, None, None] for f in (torch.cos, torch.sin))
    turn = c * eye + (1 - c) / 3 + d / 3 ** 0.5 * (eye.roll(1, 0) - eye.roll(2, 0))
    matrix = turn @ (s * eye + (1 - s) * grey) * b * k
    mean = (x.mean((2, 3)) @ grey)[:, None, None] * b * (1 - k)
    return (matrix @ x.flatten(2) + mean).clamp(0, 255).view(x.shape)


def square_mask(centres, side, size):
    """float (B, size, size): 0 in a square of `side` around each centre (B, 2), clipped, else 1."""
    at = torch.arange(size, device=centres.device)
    start = centres.unsqueeze(2) - side // 2
    inside = (at >= start) & (at < start + side)
    return (~(inside[:, 0, :, None] & inside[:, 1, None, :])).float()


# ---------------------------------------------------------------------------------------------


@one_line_errors
def main(argv=None):
    parser = Parser(prog='generate_data.py', description=__doc__.split('\n')[0])
    parser.add_argument('--kind', required=True, choices=list(USED))
    parser.add_argument('--out', required=True, help='folder to write')
    parser.add_argument('--force', action='store_true', help='replace the folder if it exists')
    parser.add_argument('--format', default='array', choices=['array', 'folder'],
                        help='two arrays, or a tree of PNG files')
    parser.add_argument('--seed', type=number(int, 0, 2 ** 62), default=0,
                        help='of pixels and labels')
    parser.add_argument('--like', choices=list(LIKE), help='number, classes and size of a target')
    parser.add_argument('--probe', action='store_true',
                        help='train a small network on the set, and write how well it did')
    parser.add_argument('--gpu', type=number(int, -1), default=-1,
                        help='CUDA device of generators and --probe, -1: the CPU')
    add_label_flags(parser)
    parser.add_argument('--image_size', type=number(int, 8, 4096),
                        help='pixels: 32 for noise; folders are resized to it')
    group = parser.add_argument_group('--generator train, or a file')
    group.add_argument('--generator_steps', type=number(int, 1))
    group.add_argument('--time_limit', type=number(float, 0, open_low=True),
                       help='minutes of training')
    group.add_argument('--generator_code', help='file.py:factory, whose state dict the file is')
    group.add_argument('--trust_generator', action='store_true', help='open a program of others')
    group.add_argument('--z_dim', type=number(int, 1))
    group.add_argument('--z_dist', choices=['normal', 'truncnorm', 'uniform'])
    group.add_argument('--truncation', type=number(float, 0, open_low=True))
    group.add_argument('--label_input', choices=['index', 'onehot'])
    group.add_argument('--output_range', choices=['-1,1', '0,1', '0,255'],
                       help='written --output_range=-1,1')
    parser.set_defaults(**SETTINGS)
    parser.set_defaults(**LIKE.get(parser.parse_args(argv).like, {}))
    args = parser.parse_args(argv)

    refuse_unused(args, args.kind)
    device = choose_device(args.gpu)

    if 'source' in used_settings(args, args.kind) and Path(args.source).is_dir():
        both = [os.path.realpath(path) for path in (args.out, args.source)]
        if os.path.commonpath(both) in both:
            raise UserError(f'--out {args.out} and --source {args.source}: one lies in the other; '
                            'write elsewhere')

    def test(data):
        print('probing')
        return {**probe(data, device), **(probe_against(data, args, device)
                                          if args.generator == 'train' else {})}

    how = dict(form=args.format, force=args.force, test=test if args.probe else None)
    if args.kind == 'noise':
        rate = write_noise(args.out, args.num_images, args.num_classes, args.image_size or 32,
                           args.seed, args.label_mode, args.multilabel, **how)
    elif args.kind == 'random_labels':
        source = read_by(args, args.source)
        rate = write_random_labels(args.out, source, args.seed, args.label_mode, args.label_noise,
                                   **how)
    else:
        rate = write_generated(args.out, args, device, **how)
    found = read_meta(Path(args.out)).get('probe', {})
    print(f'wrote {args.out}, {rate:,.0f} images/s: look at {Path(args.out) / "sheet.png"}')
    if found:
        print(f'probe {found["network"]:.1f}%, nearest neighbour {found["nearest_neighbour"]:.1f}% '
              f'({found["measure"]}, {found["n_train"]:,} to train, {found["n_test"]:,} to test)')
    if 'generated_to_real' in found:
        print(f'train on generated, test on real: {found["generated_to_real"]:.1f}%\n'
              f'train on real, test on generated: {found["real_to_generated"]:.1f}%\n'
              f'train on as many real, test on real: {found["real_to_real"]:.1f}%')
    print(f'next: python search.py --data {shlex.quote(args.out)} --gpu 0')


# Settings of unreal data, with their defaults, and what each kind and generator makes of them
SHARED = dict(num_images=50000, num_classes=10, multilabel=False, source='cifar10',
              label_mode='uniform', label_noise=1.0, uncertain='mixed', views='frontal',
              generator='fractal', difficulty='medium', systems_per_class=None)
SETTINGS = dict(SHARED, generator_steps=50000, time_limit=math.inf, generator_code=None,
                trust_generator=False, z_dim=128, z_dist='normal', truncation=1.0,
                label_input='index', output_range='-1,1')
USED = {'noise': {'num_images', 'num_classes', 'multilabel', 'label_mode'},
        'random_labels': {'source', 'label_mode', 'label_noise'},
        'generated': {'num_images', 'generator'}}
USED_BY = {
    'fractal': {'num_classes', 'difficulty', 'systems_per_class', 'multilabel'},
    'spectrum': {'num_classes', 'difficulty'}, 'deadleaves': {'num_classes', 'difficulty'},
    'mixed': {'num_classes', 'difficulty', 'systems_per_class'},
    'train': {'source', 'generator_steps', 'time_limit'},
    'FILE': {'num_classes', 'generator_code', 'trust_generator', 'z_dim', 'z_dist', 'truncation',
             'label_input', 'output_range'}}
LIKE = {'cifar10': dict(num_images=50000, num_classes=10, image_size=32),
        'cifar100': dict(num_images=50000, num_classes=100, image_size=32),
        'imagenet': dict(num_images=128000, num_classes=1000, image_size=224),
        'chexpert': dict(num_images=20000, num_classes=14, image_size=224, multilabel=True)}


def add_label_flags(parser):
    """The flags of unreal data that generate_data.py, search.py and retrain.py share."""
    group = parser.add_argument_group('unreal data')
    group.add_argument('--num_images', type=number(int, 1, 10 ** 9), help='of an unreal set')
    group.add_argument('--num_classes', type=number(int, 1, 10 ** 6), help='of an unreal set')
    group.add_argument('--multilabel', action='store_true',
                       help='labels of 0 or 1: of noise and fractals')
    group.add_argument('--source', type=name_or_path,
                       help='whose images get random labels, or train a generator')
    group.add_argument('--label_mode', choices=['uniform', 'balanced', 'permute'],
                       help='how random labels are drawn')
    group.add_argument('--label_noise', type=number(float, 0, 1),
                       help='share of the true labels that is drawn anew')
    group.add_argument('--uncertain', choices=['mixed', 'ones', 'zeros', 'ignore'],
                       help='what -1.0 of CheXpert becomes; mixed: ones for Atelectasis and Edema')
    group.add_argument('--views', choices=['frontal', 'all'], help='of CheXpert')
    group.add_argument('--generator', metavar='{fractal,spectrum,deadleaves,mixed,train,FILE}',
                       help='of generated images')
    group.add_argument('--difficulty', choices=list(DIFFICULTY), help='of generated images')
    group.add_argument('--systems_per_class', type=number(int, 1, 10 ** 4),
                       help='fractals of a class: 8, or 1 for 1,000 classes and more')
    parser.set_defaults(**SHARED)
    group.add_argument('--data_dir', default='data', help='folder of the real data sets')
    group.add_argument('--download', action='store_true', help='let torchvision fetch CIFAR')


if __name__ == '__main__':
    sys.exit(main())
