"""Write unreal data sets, and read every data set: unreal, CIFAR, a folder of images.

    python generate_data.py --kind noise --out data/noise             # 50,000 x 32 px, seconds
    python generate_data.py --kind random_labels --source cifar10 --out data/random_labels
    python generate_data.py --kind noise --out data/small --num_images 1000        # one second

A set is made in a hidden folder and renamed when whole, so a run that was stopped is simply run
again. `noise` is Gaussian pixels with random labels; `random_labels` is new labels for a source's
images, which stay where they are: cifar10 or cifar100 in their python layout under --data_dir, a
written set, or a folder with a folder of images for each class (train/ and val/, or one tree).
"""
import argparse
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import pickle
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
    """An argparse type: a finite int or float from low to high, without the bounds where open."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f'{text!r} is no {kind.__name__}') from None
        inside = low <= value <= high and math.isfinite(value)
        if not inside or (open_low and value == low) or (open_high and value == high):
            raise argparse.ArgumentTypeError(f'{text} is not from {low} to {high}')
        return value
    return parse


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
        temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def locked(path):
    """The file `path`, open and held by this process alone until it is closed."""
    while True:
        file = open(path, 'w')  # noqa: SIM115
        if not fcntl:
            return file
        fcntl.flock(file, fcntl.LOCK_EX)
        # Who held it before may have removed it: then another file of that name is the lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


@contextlib.contextmanager
def new_folder(out, force=False):
    """Yields a hidden folder beside `out` that takes its name when the block ends well.

    One process at a time; an `out` that exists, or came to be while this one waited, is refused
    without `force`. What killed runs left is removed.
    """
    out = Path(os.path.abspath(out))
    if force and out.exists() and not (out / 'meta.json').exists() and any(out.iterdir()):
        raise UserError(f'{out} is no data set of ours: --force does not replace it')
    lock, temporary = (out.with_name(f'.{out.name}.{end}') for end in ('lock', f'tmp{os.getpid()}'))
    if force or not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock):
            if fcntl:
                for left in out.parent.glob(f'.{out.name}.tmp*'):
                    shutil.rmtree(left, ignore_errors=True)
            try:
                if force or not out.exists():
                    temporary.mkdir()
                    yield temporary
                    if out.exists():
                        os.replace(out, out.with_name(f'.{out.name}.tmp-old'))
                    os.replace(temporary, out)
                    return
            except OSError as error:
                error.filename = error.filename or str(out)
                raise
            finally:
                for left in (temporary, out.with_name(f'.{out.name}.tmp-old')):
                    shutil.rmtree(left, ignore_errors=True)
                lock.unlink(missing_ok=True)
    raise UserError(f'{out} exists already: choose another --out, or --force to replace it')


class Progress:
    """One line with what is done, the rate and the time left; in a log file one every 30 s."""
    def __init__(self, total, unit, done=0):
        self.total, self.unit, self.first = total, unit, done
        self.start = self.last = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def update(self, done, text=''):
        """done: units in all, counted from the very start; text: shown at the end of the line."""
        now = time.monotonic()
        if now - self.last < (0.2 if self.terminal else 30):
            return
        self.last = now
        rate = (done - self.first) / max(now - self.start, 1e-9)
        left = timedelta(seconds=round((self.total - done) / max(rate, 1e-9)))
        line = f'{done:,}/{self.total:,} {self.unit}  {rate:,.1f}/s  {left} left  {text}'
        print(line.ljust(78)[:118], end='\r' if self.terminal else '\n', file=sys.stderr)

    def close(self):
        if self.terminal:
            print(' ' * 118, end='\r', file=sys.stderr, flush=True)


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


def noise_images(seed, start, count, size):
    """Images start to start+count of the noise of a seed: uint8 (count, size, size, 3)."""
    pixels = size * size * 3
    blocks = -(-pixels // 16)                       # of 4 x 64 bits: 16 pixels of 16 bits each
    raw = philox(seed, PIXELS, start * blocks, count * blocks * 4)
    halves = raw.astype('<u8', copy=False).view('<u2').reshape(count, -1)[:, :pixels]
    return normal_table()[halves].reshape(count, size, size, 3)


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
# Writing a data set


def write_noise(out, num_images, num_classes, image_size, seed, mode='uniform', multilabel=False,
                form='array', force=False):
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
    write_set(out, meta, labels, chunks, form, force)


def write_random_labels(out, source, seed, mode='uniform', label_noise=1.0, form='array',
                        force=False):
    """New labels for the images of `source`, a Data, and a reference to those images."""
    labels = redraw_labels(source.labels, len(source.classes), seed, mode, label_noise)
    meta = {'kind': 'random_labels', 'seed': seed, 'mean': source.mean, 'std': source.std,
            'classes': source.classes, 'image_size': source.image_size, 'label_mode': mode,
            'label_noise': label_noise, 'source': source.origin}
    chunks = (source.get(range(start, min(start + 256, len(labels))))
              for start in range(0, len(labels), 256))
    write_set(out, meta, labels, chunks, form, force, reference=source)


def write_set(out, meta, labels, chunks, form='array', force=False, reference=None):
    """Stream chunks of images (uint8, n x H x W x 3) and their labels into the folder `out`.

    form: 'array' writes images.npy (none where `reference` is a Data that has the images) and
    labels.npy; 'folder' a tree of PNG files, a folder for each class. meta.json and sheet.png
    are written beside them.
    """
    if form == 'folder' and labels.ndim == 2:
        raise UserError('--format folder has one class for each image: leave out --multilabel')
    if form == 'folder':                # so that the order of the folders is that of the classes
        width = len(str(len(meta['classes']) - 1))
        meta['classes'] = [name.zfill(width) if name.isdigit() else name
                           for name in meta['classes']]
    shape = (len(labels), meta['image_size'], meta['image_size'], 3)
    meta = {**meta, 'num_images': len(labels), 'multilabel': labels.ndim == 2, 'format': form}
    progress = Progress(len(labels), 'images')
    with new_folder(out, force) as folder:
        digest, shown, done = hashlib.sha256(), [], 0
        images = None
        if form == 'array' and reference is None:
            images = open(folder / 'images.npy', 'wb')  # noqa: SIM115
            np.lib.format.write_array_header_1_0(
                images, {'descr': '|u1', 'fortran_order': False, 'shape': shape})
        with images or contextlib.nullcontext():
            for chunk in chunks:
                shown += list(chunk[:max(0, 100 - len(shown))])
                if images:
                    images.write(chunk.tobytes())
                    digest.update(chunk.tobytes())
                elif form == 'folder':
                    digest.update(chunk.tobytes())
                    write_pngs(folder, chunk, labels, done, meta['classes'])
                done += len(chunk)
                progress.update(done)
                if form == 'array' and reference is not None and done >= 100:
                    break
        progress.close()
        if form == 'array':
            np.save(folder / 'labels.npy', labels)
        by_reference = form == 'array' and reference is not None
        meta['sha256'] = {'images': reference.sha256() if by_reference else digest.hexdigest(),
                          'labels': hashlib.sha256(labels.tobytes()).hexdigest()}
        contact_sheet(np.stack(shown), labels[:len(shown)], meta).save(folder / 'sheet.png')
        meta['command'] = shlex.join(['python', Path(sys.argv[0]).name, *sys.argv[1:]])
        meta['versions'] = {'python': sys.version.split()[0], 'numpy': np.__version__,
                            'pillow': Image.__version__, 'torch': torch.__version__}
        write_file(folder / 'meta.json', json.dumps(meta, indent=1) + '\n')


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
    title = f'{meta["kind"]}: {meta["num_images"]:,} images of {meta["image_size"]} px, ' \
            f'{len(meta["classes"])} {"labels" if labels.ndim == 2 else "classes"}, ' \
            f'seed {meta["seed"]}'
    pen.text((gap, 8), title, 'black', ImageFont.load_default(15))
    for place, k in enumerate(order):
        x = gap + place % 10 * (size + gap)
        y = 34 + place // 10 * (size + text + gap)
        resample = Image.NEAREST if images.shape[1] <= size else Image.LANCZOS
        sheet.paste(Image.fromarray(images[k]).resize((size, size), resample), (x, y))
        present = [labels[k]] if labels.ndim == 1 else np.flatnonzero(labels[k])
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
    kind: str                   # 'real', 'noise', 'random_labels'
    images: object              # array, or list of paths
    labels: np.ndarray          # int64 (N,), or uint8 (N, classes) where several labels hold
    classes: list
    mean: list                  # of pixels / 255, per channel
    std: list
    image_size: int
    origin: dict                # where it came from: enough to find it again
    on_device: dict = field(default_factory=dict, repr=False)

    @property
    def multilabel(self):
        return self.labels.ndim == 2

    @property
    def resident(self):
        """Whether it is small enough to live on the device."""
        return len(self.labels) * self.image_size ** 2 * 3 <= RESIDENT

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        """uint8 (H, W, 3): for torch's DataLoader."""
        return torch.from_numpy(self.get([index])[0])

    def get(self, indices):
        """uint8 (len(indices), H, W, 3)."""
        if isinstance(self.images, np.ndarray):
            return self.images[np.asarray(indices)]
        return np.stack([read_image(self.images[i], self.image_size) for i in indices])

    def sha256(self):
        """Of the images, or of the names and sizes of their files where they are not in memory."""
        if isinstance(self.images, np.ndarray):
            return hashlib.sha256(np.ascontiguousarray(self.images)).hexdigest()
        names = [f'{path.parent.name}/{path.name} {path.stat().st_size}' for path in self.images]
        return hashlib.sha256('\n'.join(names).encode()).hexdigest()


def read(name, data_dir='data', split='train', image_size=None, download=False):
    """Data of one split, 'train' or 'test': `name` is cifar10, cifar100 or the path of a folder.

    None where the set has no test split. image_size: resize real images to it (those of a folder
    to 32 if not given); a written set is never resized. UserError for what is missing or broken.
    """
    if name in CIFAR:
        data = read_cifar(name, data_dir, split, download)
    elif not Path(name).is_dir():
        raise UserError(f'{name}: neither a folder nor cifar10, cifar100, noise, random_labels')
    elif (Path(name) / 'meta.json').exists():
        data = read_written(Path(name), data_dir, split)
    else:
        data = read_folder(Path(name), split, image_size or 32)
    if data and image_size and data.image_size != image_size:
        if name not in CIFAR:
            raise UserError(f'{name}: its images have {data.image_size} px, not --image_size '
                            f'{image_size}: leave that out, or generate it at that size')
        images = [np.asarray(Image.fromarray(x).resize((image_size, image_size), Image.BICUBIC))
                  for x in data.images]
        data = replace(data, images=np.stack(images), image_size=image_size,
                       origin={**data.origin, 'resized': True})
    return data


def read_written(folder, data_dir, split):
    """A set of write_set; 'test' is None, since unreal data have no test split."""
    meta = read_meta(folder)
    if split != 'train':
        return None
    if meta['format'] == 'folder':
        data = read_folder(folder, split, meta['image_size'])
        if not set(data.classes) <= set(meta['classes']):
            raise UserError(f'{folder} has folders that meta.json does not name: remove them')
        places = np.array([meta['classes'].index(name) for name in data.classes])
        return replace(data, kind=meta['kind'], mean=meta['mean'], std=meta['std'],
                       labels=places[data.labels], classes=meta['classes'])
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
    size = meta['image_size']
    data = Data(str(folder), meta['kind'], images, labels, meta['classes'], meta['mean'],
                meta['std'], size, {'name': str(folder.resolve())})
    sound = images.shape == (len(labels), size, size, 3) and images.dtype == np.uint8
    if not sound or (data.resident and data.sha256() != meta['sha256']['images']):
        raise UserError(f'{folder}/images.npy is not what meta.json says: generate it again')
    return data


def read_meta(folder):
    try:
        meta = json.loads((folder / 'meta.json').read_text())
        sound = meta['kind'] in USED and meta['format'] in ('array', 'folder') \
            and all(type(meta[k]) is int and meta[k] > 0 for k in ('image_size', 'num_images')) \
            and all(isinstance(name, str) for name in meta['classes']) and len(meta['classes']) \
            and all(len(meta[k]) == 3 and all(math.isfinite(v) for v in meta[k])
                    for k in ('mean', 'std')) and min(meta['std']) > 0
        if meta['format'] == 'array':
            meta['sha256']['labels'], meta['sha256']['images']
            sound = sound and (meta['kind'] == 'noise' or 'name' in meta['source'])
        if not sound:
            raise ValueError
        return meta
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{folder}/meta.json is broken: generate the set again') from None


def read_source(folder, meta, data_dir):
    """The images that a set of random labels refers to, looked for under data_dir as well."""
    origin = meta.get('source', {})
    places = [origin.get('data_dir'), data_dir] if 'data_dir' in origin else [data_dir]
    for place in places:
        with contextlib.suppress(UserError):
            source = read(origin['name'], place, 'train',
                          meta['image_size'] if origin.get('resized') else None)
            if source.sha256() == meta['sha256']['images']:
                return source
    raise UserError(f'{folder}: its images ({origin.get("name")}) are not in {places[0]} as they '
                    'were: give their --data_dir, or generate it again')


def load_array(path, **kwargs):
    try:
        return np.load(path, allow_pickle=False, **kwargs)
    except FileNotFoundError:
        raise UserError(f'{path} is missing: generate the set again') from None
    except (ValueError, EOFError):
        raise UserError(f'{path} is truncated or not an array: generate the set again') from None


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
            official(data_dir, download=True)
        except Exception as error:
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
    try:
        with open(path, 'rb') as file:
            entries = PlainUnpickler(file, encoding='bytes').load()
        return {k.decode(errors='replace') if isinstance(k, bytes) else k: v
                for k, v in entries.items()}
    except OSError:
        raise
    except Exception as error:
        raise UserError(f'{path} is no CIFAR file ({error or "truncated"}): unpack it again') \
            from None


EXTENSIONS = {'.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm', '.pgm'}


def read_folder(root, split, image_size):
    """A tree with a folder for each class: root/train and root/val (or test), or root alone.

    A tree without val/ has no test split. Resident sets are decoded at once.
    """
    train = root / 'train' if (root / 'train').is_dir() else root
    tests = [root / name for name in ('val', 'test') if (root / name).is_dir()]
    classes, folder = class_names(train), train
    if split == 'test':
        if train == root or not tests:
            return None
        folder = tests[0]
        differ = sorted(set(classes) ^ set(class_names(folder)))
        if differ:
            raise UserError(f'{folder} and {train} differ in their classes: '
                            f'{", ".join(differ[:5])}: give both the same folders')
    files, labels = list_images(folder, classes)
    data = Data(str(root), 'real', files, labels, classes, None, None, image_size,
                {'name': str(root.resolve()), 'resized': True})
    if data.resident:
        data.images = decode(files, image_size)
    mean, std = mean_and_std(tuple(list_images(train, classes)[0]), image_size)
    return replace(data, mean=mean, std=std)


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


def decode(files, image_size):
    """All files as uint8 (N, H, W, 3), several at a time."""
    images = np.empty((len(files), image_size, image_size, 3), np.uint8)
    progress = Progress(len(files), 'images')
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for k, pixels in enumerate(pool.map(lambda f: read_image(f, image_size), files)):
            images[k] = pixels
            progress.update(k + 1)
    return images


def read_image(path, image_size):
    """uint8 (image_size, image_size, 3): shorter side resized, antialiased, centre cropped.

    Grey becomes RGB; 16-bit images are scaled by the range of their type, floating-point ones by
    their own range.
    """
    try:
        with Image.open(path) as image:
            image.draft('RGB', (2 * image_size, 2 * image_size))
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith('I') or image.mode == 'F':
                pixels = np.asarray(image).astype(np.float64)
                low, high = (0, 65535) if image.mode != 'F' and pixels.max() < 65536 \
                    else (pixels.min(), pixels.max())
                image = Image.fromarray(np.uint8(np.rint(
                    np.clip((pixels - low) / max(high - low, 1e-12), 0, 1) * 255)))
            image = image.convert('RGB')
            if image.size != (image_size, image_size):
                scale = image_size / min(image.size)
                w, h = (max(image_size, round(side * scale)) for side in image.size)
                left, top = (w - image_size) // 2, (h - image_size) // 2
                image = image.resize((w, h), Image.BICUBIC).crop(
                    (left, top, left + image_size, top + image_size))
            return np.asarray(image)
    except Exception as error:
        raise UserError(f'{path}: not a readable image ({error}): mend or remove it') from None


# ---------------------------------------------------------------------------------------------
# From a data set to batches


def refuse_unused(args, kind):
    """UserError for a setting of unreal data that `kind` would pass over in silence."""
    for name in SETTINGS.keys() - USED.get(kind, set()):
        by_quick = name == 'num_images' and getattr(args, 'quick', False)
        if getattr(args, name) != SETTINGS[name] and not by_quick:
            raise UserError(f'--{name} means nothing for {kind}: leave it out')


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
        source = read(args.source, args.data_dir, 'train', args.image_size, args.download)
        folder /= (f'random_labels-{Path(args.source).name}-{source.sha256()[:8]}'
                   f'-{source.image_size}px-{args.label_mode}-{args.label_noise:g}'
                   f'-seed{args.data_seed}')
        make = functools.partial(write_random_labels, folder, source, args.data_seed,
                                 args.label_mode, args.label_noise)
    else:
        data = read(args.data, args.data_dir, 'train', args.image_size, args.download)
        if data.image_size < 8:
            raise UserError(f'{args.data}: {data.image_size} px are too few: 8 or more needed')
        return data
    if not folder.exists():
        print(f'making {folder}', file=sys.stderr)
        try:
            make()
        except UserError:
            if not folder.exists():             # else another run has just made it
                raise
    return read(str(folder), args.data_dir)


def stratified_split(labels, fraction, seed):
    """Two sorted index arrays: a share `fraction` of every class, drawn by seed, and the rest.

    A class with one image gives it to the first; with two or more, both halves have some. Images
    with several labels are split without regard to them.
    """
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
    random draws depend on (seed, epoch) alone, so an epoch can be entered at any step.
    augment: 'standard' is RandomCrop(padding 4 at 32 px) and flip, 'auto' that for images and
    nothing for noise; cutout: side of a square that is blanked (arXiv 1708.04552), 0 for none.
    Training drops the last incomplete batch, so that shapes never change; with shuffle=False
    every image comes once, in order.
    """
    def __init__(self, data, indices, batch_size, device, augment='none', cutout=0, seed=0,
                 shuffle=True, workers=2):
        if len(indices) < batch_size and shuffle:
            raise UserError(f'--batch_size {batch_size} is more than the {len(indices)} images of '
                            f'its split of {data.name}: take a smaller one')
        self.data, self.indices, self.batch_size = data, np.asarray(indices), batch_size
        self.device, self.augment, self.cutout, self.seed = device, augment, cutout, seed
        self.shuffle, self.workers = shuffle, workers
        if augment == 'auto':
            self.augment = 'none' if data.kind == 'noise' else 'standard'
        self.mean = torch.tensor(data.mean, device=device) * 255
        self.scale = 1 / (torch.tensor(data.std, device=device) * 255)
        labels = torch.from_numpy(np.ascontiguousarray(data.labels))
        self.labels = (labels.float() if data.multilabel else labels).to(device)
        if data.resident and str(device) not in data.on_device:
            images = np.ascontiguousarray(data.get(range(len(data))))
            data.on_device[str(device)] = torch.from_numpy(images).to(device)

    def __len__(self):
        n = len(self.indices)
        return n // self.batch_size if self.shuffle else -(-n // self.batch_size)

    def epoch(self, epoch=0, start=0):
        """Batches start, start + 1, ... of an epoch."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
        n, size, step = len(self.indices), self.data.image_size, self.batch_size
        order = self.indices[rng.permutation(n)] if self.shuffle else self.indices
        padding = size // 8
        draws = order, *(rng.integers(0, high, shape) for high, shape in (
            (2 * padding + 1, (n, 2)), (2, n), (size, (n, 2))))
        order, *draws = (torch.from_numpy(d).to(self.device) for d in draws)
        slices = [slice(k * step, (k + 1) * step) for k in range(start, len(self))]
        for part, x in zip(slices, self.pixels(order, slices)):
            offsets, flips, centres = (d[part] for d in draws)
            if self.augment == 'standard':
                x = crop_and_flip(x, offsets, flips, padding)
            x = ((x.float() - self.mean) * self.scale).permute(0, 3, 1, 2)
            if self.cutout:
                x = x * square_mask(centres, self.cutout, size).unsqueeze(1)
            yield x, self.labels[order[part]]

    def pixels(self, order, slices):
        """uint8 (B, H, W, 3) on the device for each slice of `order`."""
        if self.data.resident:
            images = self.data.on_device[str(self.device)]
            for part in slices:
                yield images[order[part]]
            return
        batches = [order[part].tolist() for part in slices]
        loader = torch.utils.data.DataLoader(
            self.data, batch_sampler=batches, num_workers=self.workers,
            pin_memory=self.device.type == 'cuda')
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


def square_mask(centres, side, size):
    """float (B, size, size): 0 in a square of `side` around each centre (B, 2), clipped, else 1."""
    at = torch.arange(size, device=centres.device)
    inside = (at >= centres.unsqueeze(2) - side // 2) & (at < centres.unsqueeze(2) + side // 2)
    return (~(inside[:, 0, :, None] & inside[:, 1, None, :])).float()


# ---------------------------------------------------------------------------------------------


@one_line_errors
def main(argv=None):
    parser = Parser(prog='generate_data.py', description=__doc__.split('\n')[0])
    parser.add_argument('--kind', required=True, choices=['noise', 'random_labels'])
    parser.add_argument('--out', required=True, help='folder to write')
    parser.add_argument('--force', action='store_true', help='replace the folder if it exists')
    parser.add_argument('--format', default='array', choices=['array', 'folder'],
                        help='two arrays, or a tree of PNG files')
    parser.add_argument('--seed', type=number(int, 0, 2 ** 62), default=0,
                        help='of pixels and labels')
    add_label_flags(parser)
    parser.add_argument('--image_size', type=number(int, 1, 4096),
                        help='pixels: 32 for noise; folders are resized to it')
    args = parser.parse_args(argv)

    refuse_unused(args, args.kind)
    if args.kind == 'noise':
        write_noise(args.out, args.num_images, args.num_classes, args.image_size or 32, args.seed,
                    args.label_mode, args.multilabel, args.format, args.force)
    elif args.kind == 'random_labels':
        source = read(args.source, args.data_dir, 'train', args.image_size, args.download)
        inside = os.path.commonpath([os.path.abspath(p) for p in (args.out, args.source)])
        if Path(args.source).is_dir() and inside in map(os.path.abspath, (args.out, args.source)):
            raise UserError(f'--out {args.out} and --source {args.source}: one lies in the other; '
                            'write elsewhere')
        write_random_labels(args.out, source, args.seed, args.label_mode, args.label_noise,
                            args.format, args.force)
    print(f'wrote {args.out}: look at {Path(args.out) / "sheet.png"}')
    print(f'next: python search.py --data {shlex.quote(args.out)} --gpu 0')


# Settings of unreal data, with their defaults, and what each kind makes of them
SETTINGS = dict(num_images=50000, num_classes=10, multilabel=False, source='cifar10',
                label_mode='uniform', label_noise=1.0)
USED = {'noise': {'num_images', 'num_classes', 'multilabel', 'label_mode'},
        'random_labels': {'source', 'label_mode', 'label_noise'}}


def add_label_flags(parser):
    """The flags of unreal data that generate_data.py, search.py and retrain.py share."""
    group = parser.add_argument_group('unreal data')
    group.add_argument('--num_images', type=number(int, 1, 10 ** 9), help='of noise')
    group.add_argument('--num_classes', type=number(int, 1, 10 ** 6), help='of noise')
    group.add_argument('--multilabel', action='store_true', help='noise with labels of 0 or 1')
    group.add_argument('--source', help='whose images get random labels')
    group.add_argument('--label_mode', choices=['uniform', 'balanced', 'permute'],
                       help='how random labels are drawn')
    group.add_argument('--label_noise', type=number(float, 0, 1),
                       help='share of the true labels that is drawn anew')
    parser.set_defaults(**SETTINGS)
    group.add_argument('--data_dir', default='data', help='folder of the real data sets')
    group.add_argument('--download', action='store_true', help='let torchvision fetch CIFAR')


if __name__ == '__main__':
    sys.exit(main())
