"""Unreal data, readers, splits and batches."""
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import one_line
from PIL import Image

import generate_data as g

CPU = torch.device('cpu')


def fake_cifar(root='data', n=20, name='cifar-10-batches-py'):
    """CIFAR-10's layout with n images a file."""
    folder = Path(root) / name
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for file in [f'data_batch_{k}' for k in range(1, 6)] + ['test_batch']:
        batch = {'data': rng.integers(0, 256, (n, 3072), np.uint8),
                 'labels': [k % 10 for k in range(n)]}
        (folder / file).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / 'batches.meta').write_bytes(pickle.dumps({'label_names': list('abcdefghij')}, 2))
    return folder


def folder_of_images(root, classes=('cat', 'dog'), n=4, size=(20, 16), ending='png'):
    """A folder of n smooth pictures for each class; size: width, height."""
    rng = np.random.default_rng(0)
    for name in classes:
        Path(root, name).mkdir(parents=True)
        for k in range(n):
            pixels = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
            Image.fromarray(pixels).resize(size).save(Path(root, name, f'{k}.{ending}'))


def settings(**changed):
    return {**g.DEFAULTS, 'data_seed': 0, **changed}


def make(out, kind='noise', force=False, **changed):
    """A small written set, read back."""
    s = settings(**{'num_images': 40, 'num_classes': 4, 'image_size': 8, **changed})
    g.make_set(out, kind, s, CPU, force)
    return g.read(out, {})


def names(folder='.'):
    return sorted(p.name for p in Path(folder).iterdir())


def test_noise_and_labels_are_the_same_bytes_everywhere():
    images = g.noise_images(0, range(64), 32)
    assert hashlib.sha256(images.tobytes()).hexdigest() == \
        '2e3fda780812c0097258595a8d8702d56f8af7bde37375a6aa85e2c6d0c49188'
    labels = g.draw_labels(0, 1000, 10)
    assert hashlib.sha256(labels.astype('<i8').tobytes()).hexdigest() == \
        'f85b9bbe6c772afc3f46f694754099a58aed0c9580bba6000d347bd70aaecdef'
    assert (g.noise_images(0, range(41, 64), 32) == images[41:]).all()
    assert (g.noise_images(3, [4, 1], 9) == g.noise_images(3, range(5), 9)[[4, 1]]).all()
    assert abs(images.mean() - 127.5) < 0.5 and abs(images.std() - 32) < 0.5
    assert (make('a', data_seed=5).labels == make('b', data_seed=5, image_size=16).labels).all()


def test_label_modes_and_label_noise():
    true = np.repeat(np.arange(5), 40)
    for mode, even in (('uniform', False), ('balanced', True), ('permute', True)):
        labels = g.redraw_labels(true, 5, 1, mode, 1.0)
        assert (np.bincount(labels, minlength=5) == 40).all() == even
        assert 0.1 < (labels == true).mean() < 0.35
    assert 0.5 <= (g.redraw_labels(true, 5, 1, 'uniform', 0.5) == true).mean() < 0.75
    assert (g.redraw_labels(true, 5, 1, 'uniform', 0) == true).all()
    rows = np.eye(5, dtype=np.uint8)[true]
    assert (g.redraw_labels(rows, 5, 1, 'permute', 1.0).sum(1) == 1).all()
    assert (g.redraw_labels(rows, 5, 1, 'balanced', 1.0).sum(0) == 100).all()


def test_a_written_set_is_read_back_and_never_replaced_without_force(capsys):
    flags = ['--kind', 'noise', '--out', 'n', '--num_images', '120', '--image_size', '8']
    assert g.main([*flags, '--num_classes', '7', '--seed', '3']) == 0
    assert 'next: python search.py --data n\n' in capsys.readouterr().out
    meta, data = json.loads(Path('n/meta.json').read_text()), g.read('n', {})
    assert {'kind', 'seed', 'command', 'versions', 'sha256', 'classes'} <= set(meta)
    assert (data.images == g.noise_images(3, range(120), 8)).all() and data.kind == 'noise'
    assert (data.mean, data.std) == ([0.5] * 3, [0.12549019607843137] * 3)
    assert g.read('n', {}, 'test') is None and names() == ['n']     # no lock, no leftover
    assert Image.open('n/sheet.png').size[0] > 500 and data.labels.max() == 6
    one_line(capsys, g.main(flags), 'n exists')
    assert json.loads(Path('n/meta.json').read_text()) == meta
    assert g.main([*flags, '--force', '--num_images', '30']) == 0 and len(g.read('n', {})) == 30
    folder_of_images('mine')
    capsys.readouterr()
    one_line(capsys, g.main(['--kind', 'noise', '--out', 'mine', '--force']), 'mine')
    assert names('mine') == ['cat', 'dog']


def test_a_sheet_shows_every_class_and_names_that_fit(capsys, monkeypatch):
    labels, several = np.array([0] * 500 + [1, 2]), np.zeros((300, 3), np.uint8)
    several[250, 2] = 1
    assert len(g.sheet_rows(labels)) == 100 and set(labels[g.sheet_rows(labels)]) == {0, 1, 2}
    assert len(g.sheet_rows(several)) == 100 and 250 in g.sheet_rows(several)
    assert len({k % 250 for k in g.sheet_rows(np.arange(3000) % 250)}) == 100
    texts = []
    monkeypatch.setattr(g.ImageDraw.ImageDraw, 'text', lambda pen, at, text, *_: texts.append(text))
    folder_of_images('own', ('cat', '\u732b', 'long ' * 9), n=110)
    assert g.main(['--kind', 'random_labels', '--source', 'own', '--label_noise', '0', '--out',
                   'r', '--test_fraction', '0']) == 0
    assert 'class 2 of the sheet: \u732b\n' in capsys.readouterr().out
    assert ' 3 of 3 classes' in texts[0] and {'cat', '2'} < {*texts}
    assert any(text[:9] == 'long long' and text[-1] == '\u2026' for text in texts)


def test_a_set_above_1_gb_says_its_size_first(capsys):
    images = g.noise_images(0, range(300), 8)
    assert (g.write_images('n.npy', 300, np.array_split(images, 7)) == images).all()
    assert not capsys.readouterr().err
    with pytest.raises(ValueError):                     # the file ends after nine of them
        g.write_images('n.npy', 10 ** 7, [images[:9]])
    assert '10,000,000 images of 8 px: 1.9 GB' in capsys.readouterr().err


def test_progress_in_a_log_file(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(g.Progress, 'last', 0.0)
    monkeypatch.setattr(g, 'time', SimpleNamespace(**{**vars(time), 'monotonic': lambda: now[0]}))
    for hint, each, said in (('; hint', 4, ''), ('; hint', 90, '; hint'), (None, 90, None)):
        progress = g.Progress(101, 'steps', 1, hint)
        now[0] += each
        progress.update(2, 'more')
        out, err = capsys.readouterr()
        left = time.strftime('%-H:%M:%S', time.gmtime(99 * each))
        assert re.fullmatch(f'2/101 steps  {each}.0 s each  {left} left  more +\n', err)
        until = f'about {left} left, until \\w+ \\d+ \\w+, \\d+:\\d+{said}\n'
        assert re.fullmatch('' if said is None else until, out)
    for _ in g.Progress(1000, 'images').over(range(1000)):          # a line by 8 s
        now[0] += 0.1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 12 and lines[0].startswith('80/1,000 images  10.0/s  0:01:32 left')
    now[0] += 30
    for _ in g.Progress(3, 'images').over(range(3)):    # what is short has none
        now[0] += 0.3
    assert not capsys.readouterr().err


def test_random_labels_refer_to_their_source():
    fake_cifar()
    data = make('r', 'random_labels', label_mode='balanced', image_size=None)
    source = g.read('cifar10', {})
    assert not Path('r/images.npy').exists()
    assert (data.images == source.images).all() and (data.labels != source.labels).any()
    assert data.mean == source.mean and data.classes == list('abcdefghij')
    Path('data').rename('moved')
    with pytest.raises(g.UserError, match='--data_dir'):
        g.read('r', {})
    assert len(g.read('r', {'data_dir': 'moved'})) == 100
    assert make('small', 'random_labels', image_size=16, data_dir='moved').images.shape[1] == 16


def test_folders_are_named_by_settings_and_never_mixed_up():
    fake_cifar()
    folder_of_images('a/own', size=(8, 8))
    folder_of_images('b/own', size=(8, 8), n=5)
    g.find_or_make('noise', settings(num_images=20, image_size=8, label_mode='balanced'))
    g.find_or_make('random_labels', settings(label_noise=0.5, data_seed=4))
    g.find_or_make('random_labels', settings(source='a/own'))
    assert names('data') == [
        'cifar-10-batches-py', 'noise-image_size=8-num_images=20-label_mode=balanced-seed0',
        'random_labels-label_noise=0.5-seed4', 'random_labels-source=own-seed0']
    with pytest.raises(g.UserError, match='was made with another source'):
        g.find_or_make('random_labels', settings(source='b/own'))
    folder = Path('data/cifar-10-batches-py')
    shutil.copy(folder / 'test_batch', folder / 'data_batch_1')
    with pytest.raises(g.UserError, match='not as they were'):
        g.find_or_make('random_labels', settings(label_noise=0.5, data_seed=4))


def make_or_wait(folder):
    torch.set_num_threads(1)                            # OpenMP's threads do not outlive a fork
    try:
        make(folder, num_images=200, image_size=16)
        return 'made'
    except g.UserError:
        return 'there'


def test_of_many_that_need_a_set_one_makes_it():
    with multiprocessing.get_context('fork').Pool(6) as pool:
        results = pool.map(make_or_wait, ['same'] * 6)
    assert sorted(results) == ['made'] + ['there'] * 5
    assert len(g.read('same', {})) == 200 and names() == ['same']


@pytest.mark.parametrize('moment', range(6))
def test_a_killed_replacement_leaves_the_old_set_or_the_new_one(moment):
    make('n')
    calls = iter(range(moment + 1))

    def mortal(function):
        def call(*args, **kwargs):
            if next(calls, None) == moment:
                os._exit(9)                             # as kill -9: no `finally` is run
            return function(*args, **kwargs)
        return call

    if os.fork() == 0:
        torch.set_num_threads(1)
        os.replace, g.shutil.rmtree = mortal(os.replace), mortal(shutil.rmtree)
        make('n', num_images=20, force=True)
        os._exit(0)
    os.wait()
    assert len(g.read('n', {})) in (40, 20)
    assert len(make('n', num_images=30, force=True)) == 30 and names() == ['n']


def python2_pickle(data, labels):
    """A pickle as Python 2 and an old numpy wrote it: byte strings, numpy.core."""
    def text(s):
        return b'U' + bytes([len(s)]) + s
    raw = data.tobytes()
    array = (b'cnumpy.core.multiarray\n_reconstruct\n' b'cnumpy\nndarray\n' b'K\x00\x85'
             + text(b'b') + b'\x87R' b'(K\x01' b'M' + struct.pack('<H', len(data))
             + b'M\x00\x0c\x86' b'cnumpy\ndtype\n' + text(b'u1') + b'K\x00K\x01\x87R(K\x03'
             + text(b'|') + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb' + b'\x89T'
             + struct.pack('<i', len(raw)) + raw + b'tb')
    numbers = b']' + b'(' + b''.join(b'K' + bytes([k]) for k in labels) + b'e'
    return b'\x80\x02}(' + text(b'data') + array + text(b'labels') + numbers + b'u.'


def test_cifar_readers(capsys):
    folder = fake_cifar()
    data = np.random.default_rng(1).integers(0, 256, (7, 3072), np.uint8)
    (folder / 'data_batch_1').write_bytes(python2_pickle(data, range(7)))
    train, test = g.read('cifar10', {}), g.read('cifar10', {}, 'test')
    assert len(train) == 87 and len(test) == 20
    assert (train.images[3].transpose(2, 0, 1).ravel() == data[3]).all() and train.labels[3] == 3
    assert len(g.read('cifar10', {'data_dir': str(folder)})) == 87      # the folder itself, too
    assert 'not as officially published' in capsys.readouterr().err
    small = g.read('cifar10', {'image_size': 16}).images
    assert small.shape == (87, 16, 16, 3) and abs(small.mean() - train.images.mean()) < 3
    Path('data/cifar-100-python').mkdir()
    for name, content in (('train', {'data': data, 'fine_labels': [99] * 7}),
                          ('meta', {'fine_label_names': [str(k) for k in range(100)]})):
        Path('data/cifar-100-python', name).write_bytes(pickle.dumps(content, 2))
    assert g.read('cifar100', {}).labels.tolist() == [99] * 7


class Runs:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


PICKLES = {
    'os.system': pickle.dumps({'data': Runs(os.system, ('touch evil',)), 'labels': [0]}),
    'open': pickle.dumps({'data': Runs(open, ('evil', 'w')), 'labels': [0]}),
    'memoryview': pickle.dumps({'data': Runs(memoryview, (b'x' * 3072,)), 'labels': [0]}),
    'no dictionary': pickle.dumps([0]),
    'no pickle': b'PK\x03\x04'}


@pytest.mark.parametrize('name', PICKLES)
def test_a_crafted_pickle_neither_runs_nor_crashes(name, capsys):
    (fake_cifar() / 'data_batch_2').write_bytes(PICKLES[name])
    one_line(capsys, g.main(['--kind', 'random_labels', '--out', 'x']), 'data_batch_2')
    assert not Path('evil').exists()


def test_image_folders_of_any_depth_of_colour():
    folder_of_images('tree/train')
    folder_of_images('tree/val', n=2)
    train, test = g.read('tree', {'image_size': 8}), g.read('tree', {'image_size': 8}, 'test')
    assert (len(train), len(test)) == (8, 4) and train.images.shape[1:] == (8, 8, 3)
    assert train.mean == test.mean
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save('tree/train/cat/deep.png')           # 16 bits, grey
    Image.fromarray((ramp // 256).astype(np.uint8)).save('tree/train/cat/grey.jpg')
    Image.fromarray(np.zeros((9, 9, 4), np.uint8)).save('tree/train/cat/rgba.png')
    deep = g.read_image('tree/train/cat/deep.png', 64)
    assert len(np.unique(deep)) == 256 and len(g.read('tree', {'image_size': 16})) == 11


def test_turned_images_are_set_upright():
    upright = Image.fromarray(np.arange(40 * 30 * 3).reshape(40, 30, 3).astype(np.uint8))
    upright.save('upright.png')
    exif = upright.getexif()
    exif[274] = 6                                       # lies on its side, by a quarter of a turn
    upright.transpose(Image.ROTATE_90).save('side.png', exif=exif)
    for crop in (False, True):
        torch.manual_seed(0)
        image = g.read_image('upright.png', 16, 1, crop)
        torch.manual_seed(0)
        assert (g.read_image('side.png', 16, 1, crop) == image).all()


EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(evil) (w) file\n'


@pytest.mark.parametrize('name, needle', [
    ('eps', 'cannot identify'), ('bomb', 'pixels'), ('cut', 'truncated')])
def test_a_hostile_image_is_one_line(name, needle, capsys):
    folder_of_images('own')
    path = Path('own/cat/0.png')
    if name == 'eps':
        path.write_bytes(EPS)
    elif name == 'bomb':
        Image.new('1', (14000, 14000)).save(path)
    else:
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(g.UserError, match=needle):
        g.read_image(path, 8)
    one_line(capsys, g.main(['--kind', 'random_labels', '--source', 'own', '--out', 'x']), '0.png')


def test_a_flipped_bit_of_a_set_is_one_line():
    for file in ('images.npy', 'labels.npy'):
        make(file)
        content = bytearray(Path(file, file).read_bytes())
        content[-20] ^= 1
        Path(file, file).write_bytes(content)
        with pytest.raises(g.UserError, match=f'other {file[:6]}'):
            g.read(file, {})


def test_split_is_stratified_exact_and_drawn_by_seed():
    labels = np.array([0] * 100 + [1] * 51 + [2] * 2 + [3])
    first, second = g.stratified_split(labels, 0.5, 0)
    assert sorted([*first, *second]) == list(range(154)) and (np.diff(first) != 1).any()
    assert np.bincount(labels[first]).tolist() == [50, 26, 1, 1]
    assert (first != g.stratified_split(labels, 0.5, 1)[0]).any()
    for n, fraction, share in ((5000, 0.025, 125), (100, 0.29, 29), (10, 0.11, 2)):
        assert len(g.stratified_split(np.zeros(n, int), fraction, 0)[0]) == share
    patients = np.repeat([f'p{k}' for k in range(20)], 3)
    first, second = g.stratified_split(np.zeros(60, int), 0.3, 0, patients)
    assert len(first) == 18 and not set(patients[first]) & set(patients[second])


def test_batches_are_the_same_from_memory_from_workers_and_from_the_middle(monkeypatch):
    data = make('noise')

    def epoch(epoch=2, start=0, workers=0):
        batches = g.Batches(data, range(40), 8, CPU, 'standard', 4, seed=1, workers=workers)
        return [torch.cat(part) for part in zip(*batches.epoch(epoch, start))]

    (x, y), (x2, y2) = epoch(), epoch(start=3)
    assert len(x) == 40 and torch.equal(x[24:], x2) and torch.equal(y[24:], y2)
    assert not torch.equal(x, epoch(3)[0])
    monkeypatch.setattr(g, 'RESIDENT', 0)               # a large set: through a DataLoader
    for workers in (0, 2):
        assert all(map(torch.equal, epoch(workers=workers), (x, y)))


@pytest.mark.parametrize('augment', ['crop', 'imagenet', 'affine'])
def test_augmentation_in_workers_depends_on_seed_epoch_and_image_alone(augment):
    folder_of_images('tree', 'a', n=10, size=(96, 72))
    data = g.read('tree', {'image_size': 65, 'test_fraction': 0.0})
    state = torch.get_rng_state()

    def epoch(workers=0, epoch=1, start=0, indices=range(10), seed=4):
        batches = g.Batches(data, indices, 2, CPU, augment, seed=seed, workers=workers)
        return torch.cat([x for x, _ in batches.epoch(epoch, start)])

    whole = epoch()
    assert all(torch.equal(whole, epoch(workers)) for workers in (2, 4))
    assert torch.equal(whole[6:], epoch(2, start=3))
    assert all((whole != x).any() for x in (epoch(epoch=2), epoch(seed=5)))
    assert torch.equal(state, torch.get_rng_state())    # a run that goes on draws the same
    Path('tree/a/3.png').write_bytes(b'no image')
    for workers in (0, 2):
        with pytest.raises(g.UserError, match='3.png: not a readable image'):
            epoch(workers)


def test_augmentation_and_order_are_those_of_plain_loops():
    data = make('n', kind='generated', image_size=16)
    batch, _ = next(g.Batches(data, range(40), 40, CPU, 'standard', 5, seed=1).epoch(2))
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([1, 2])))
    order, draws = rng.permutation(40), rng.random((40, 11), np.float32)
    for x, k, u in zip(batch, order, draws):
        image = np.pad(data.images[k], ((2, 2), (2, 2), (0, 0)))
        top, left = (u[3:5] * 5).astype(int)
        image = image[top:top + 16, left:left + 16]
        image = image[:, ::-1] if u[0] < 0.5 else image
        wanted = (image / 255 - data.mean) / data.std
        row, column = (u[1:3] * 16).astype(int) - 2
        wanted[max(0, row):row + 5, max(0, column):column + 5] = 0
        assert np.allclose(x.permute(1, 2, 0), wanted, atol=1e-4)
    labels = [y for _, y in g.Batches(data, range(37), 8, CPU, shuffle=False).epoch()]
    assert torch.cat(labels).tolist() == data.labels[:37].tolist()      # every image once


def test_auto_is_the_augmentation_that_suits_the_images():
    data = make('noise')
    assert g.suited(data) == 'none'
    data.kind = 'real'
    assert g.suited(data) == 'standard' and g.suited(g.replace(data, image_size=72)) == 'imagenet'
    assert g.suited(g.replace(data, labels=np.zeros((40, 4), np.uint8))) == 'affine'
    with pytest.raises(g.UserError, match='--batch_size 50'):
        g.Batches(data, range(40), 50, CPU)
