"""Unreal data, readers, splits and batches."""
import hashlib
import json
import multiprocessing
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
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


def folder_of_images(root, classes=('cat', 'dog'), n=4, size=(20, 16)):
    for k, name in enumerate(classes):
        (Path(root) / name).mkdir(parents=True)
        for i in range(n):
            pixels = np.full((*size, 3), 40 * k + 5 * i, np.uint8)
            Image.fromarray(pixels).save(Path(root) / name / f'{i}.png')


def test_noise_is_the_same_bytes_everywhere():
    images = g.noise_images(0, 0, 64, 32)
    assert hashlib.sha256(images.tobytes()).hexdigest() == \
        '2e3fda780812c0097258595a8d8702d56f8af7bde37375a6aa85e2c6d0c49188'
    labels = g.draw_labels(0, 1000, 10)
    assert hashlib.sha256(labels.astype('<i8').tobytes()).hexdigest() == \
        'f85b9bbe6c772afc3f46f694754099a58aed0c9580bba6000d347bd70aaecdef'
    pieces = [g.noise_images(0, start, count, 32) for start, count in ((0, 1), (1, 40), (41, 23))]
    assert (np.concatenate(pieces) == images).all()
    odd = g.noise_images(3, 0, 5, 9)                    # 243 pixels: no whole number of blocks
    assert (g.noise_images(3, 4, 1, 9)[0] == odd[4]).all()


def test_noise_is_standard_normal_after_normalising():
    x = g.noise_images(1, 0, 300, 32).astype(np.float64)
    assert abs(x.mean() - 127.5) < 0.2 and abs(x.std() - 32) < 0.2
    z = (x - 127.5) / 32
    assert abs((z ** 4).mean() - 3) < 0.05 and abs((np.abs(z) > 1.96).mean() - 0.05) < 0.002
    assert abs(np.corrcoef(x[:-1].ravel()[:200000], x[1:].ravel()[:200000])[0, 1]) < 0.01
    assert (g.noise_images(2, 0, 1, 32) != x[0]).mean() > 0.9


def test_labels_depend_on_their_seed_alone():
    a = g.draw_labels(5, 1000, 10)
    assert (a == g.draw_labels(5, 1000, 10)).all() and (a != g.draw_labels(6, 1000, 10)).any()
    g.write_noise('a', 100, 10, 8, 5)
    g.write_noise('b', 100, 10, 16, 5)
    assert (np.load('a/labels.npy') == np.load('b/labels.npy')).all()
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.1


def test_label_modes_and_label_noise():
    true = np.repeat(np.arange(5), 40)
    for mode, even in (('uniform', False), ('balanced', True), ('permute', True)):
        labels = g.redraw_labels(true, 5, 1, mode, 1.0)
        assert (np.bincount(labels, minlength=5) == 40).all() == even
        assert 0.1 < (labels == true).mean() < 0.35
    half = g.redraw_labels(true, 5, 1, 'uniform', 0.5)
    assert 0.5 <= (half == true).mean() < 0.75
    assert (g.redraw_labels(true, 5, 1, 'uniform', 0) == true).all()
    rows = np.eye(5, dtype=np.uint8)[true]
    permuted = g.redraw_labels(rows, 5, 1, 'permute', 1.0)
    assert (permuted.sum(1) == 1).all() and (permuted != rows).any()
    assert (g.redraw_labels(rows, 5, 1, 'balanced', 1.0).sum(0) == 100).all()


def test_written_set_is_whole_and_read_back():
    assert g.main(['--kind', 'noise', '--out', 'n', '--num_images', '120', '--num_classes', '7',
                   '--image_size', '8', '--seed', '3']) == 0
    meta = json.loads(Path('n/meta.json').read_text())
    images, labels = np.load('n/images.npy'), np.load('n/labels.npy')
    assert images.shape == (120, 8, 8, 3) and labels.max() == 6
    assert meta['sha256']['images'] == hashlib.sha256(images.tobytes()).hexdigest()
    assert {'kind', 'seed', 'command', 'versions', 'mean', 'std', 'classes'} <= set(meta)
    assert Image.open('n/sheet.png').size[0] > 500
    data = g.read('n')
    assert (data.images == g.noise_images(3, 0, 120, 8)).all() and data.kind == 'noise'
    assert g.read('n', split='test') is None
    assert sorted(p.name for p in Path('.').iterdir()) == ['n']             # no lock, no leftover
    before = Path('n/meta.json').read_text()
    assert g.main(['--kind', 'noise', '--out', 'n']) == 2                   # refused
    assert Path('n/meta.json').read_text() == before
    assert g.main(['--kind', 'noise', '--out', 'n', '--force', '--num_images', '30',
                   '--image_size', '8']) == 0
    assert len(g.read('n')) == 30
    Path('letter').write_text('dear')
    assert g.main(['--kind', 'noise', '--out', 'letter', '--force']) == 2
    assert Path('letter').read_text() == 'dear'


def test_multilabel_and_folder_formats():
    assert g.main(['--kind', 'noise', '--out', 'm', '--multilabel', '--num_classes', '14',
                   '--num_images', '50', '--image_size', '8']) == 0
    data = g.read('m')
    assert data.labels.shape == (50, 14) and set(np.unique(data.labels)) == {0, 1}
    assert next(g.Batches(data, range(50), 10, CPU).epoch())[1].dtype == torch.float32
    assert g.main(['--kind', 'noise', '--out', 'f', '--format', 'folder', '--num_classes', '3',
                   '--num_images', '30', '--image_size', '8', '--label_mode', 'balanced']) == 0
    tree = g.read('f')
    assert tree.classes == ['0', '1', '2'] and (np.bincount(tree.labels) == 10).all()
    assert tree.kind == 'noise' and tree.mean == [0.5] * 3
    assert g.main(['--kind', 'noise', '--out', 'x', '--format', 'folder', '--multilabel']) == 2


def test_random_labels_refer_to_their_source():
    fake_cifar()
    assert g.main(['--kind', 'random_labels', '--out', 'r', '--label_mode', 'balanced']) == 0
    assert not Path('r/images.npy').exists()
    data, source = g.read('r'), g.read('cifar10')
    assert (data.images == source.images).all() and (data.labels != source.labels).any()
    assert data.mean == source.mean and data.classes == list('abcdefghij')
    Path('data').rename('moved')
    with pytest.raises(g.UserError, match='--data_dir'):
        g.read('r')
    assert len(g.read('r', 'moved')) == 100
    folder_of_images('own', size=(8, 8))
    assert g.main(['--kind', 'random_labels', '--source', 'own', '--image_size', '8',
                   '--out', 'o', '--format', 'folder']) == 0
    assert len(g.read('o')) == 8 and g.read('o').classes == ['cat', 'dog']


def python2_pickle(data, labels):
    """A pickle as Python 2 and an old numpy wrote it: byte strings, numpy.core."""
    def text(s):
        return b'U' + bytes([len(s)]) + s
    raw = data.tobytes()
    array = (b'cnumpy.core.multiarray\n_reconstruct\n' b'cnumpy\nndarray\n' b'K\x00\x85'
             + text(b'b') + b'\x87R' b'(K\x01' b'M' + struct.pack('<H', len(data))
             + b'M\x00\x0c\x86' b'cnumpy\ndtype\n' + text(b'u1') + b'K\x00K\x01\x87R(K\x03'
             + text(b'|') + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb' b'\x89T'
             + struct.pack('<i', len(raw)) + raw + b'tb')
    numbers = b']' + b'(' + b''.join(b'K' + bytes([k]) for k in labels) + b'e'
    return b'\x80\x02}(' + text(b'data') + array + text(b'labels') + numbers + b'u.'


def test_cifar_readers(capsys):
    folder = fake_cifar()
    data = np.random.default_rng(1).integers(0, 256, (7, 3072), np.uint8)
    (folder / 'data_batch_1').write_bytes(python2_pickle(data, range(7)))
    train, test = g.read('cifar10'), g.read('cifar10', split='test')
    assert len(train) == 87 and len(test) == 20
    assert (train.images[3].transpose(2, 0, 1).ravel() == data[3]).all() and train.labels[3] == 3
    assert len(g.read('cifar10', str(folder))) == 87            # the folder itself, too
    assert 'not as officially published' in capsys.readouterr().err
    hundred = Path('data/cifar-100-python')
    hundred.mkdir()
    batch = {'data': data, 'fine_labels': [99] * 7, 'coarse_labels': [0] * 7}
    for name in ('train', 'test'):
        (hundred / name).write_bytes(pickle.dumps(batch, 2))
    names = {'fine_label_names': [str(k) for k in range(100)]}
    (hundred / 'meta').write_bytes(pickle.dumps(names, 2))
    assert len(g.read('cifar100').classes) == 100
    assert g.read('cifar100').mean != g.read('cifar10').mean


def test_a_pickle_that_runs_code_is_not_run():
    folder = fake_cifar()

    class Evil:
        def __reduce__(self):
            return (open, ('evil', 'w'))
    (folder / 'data_batch_2').write_bytes(pickle.dumps({'data': Evil()}))
    with pytest.raises(g.UserError, match='not allowed'):
        g.read('cifar10')
    assert not Path('evil').exists()


def test_image_folders():
    folder_of_images('tree/train')
    folder_of_images('tree/val', n=2)
    train, test = g.read('tree', image_size=8), g.read('tree', split='test', image_size=8)
    assert (len(train), len(test)) == (8, 4) and train.images.shape[1:] == (8, 8, 3)
    assert train.mean == test.mean and g.read('tree/train', split='test') is None
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save('tree/train/cat/deep.png')           # 16 bits, grey
    Image.fromarray((ramp // 256).astype(np.uint8)).save('tree/train/cat/grey.jpg')
    Image.fromarray(np.zeros((9, 9, 4), np.uint8)).save('tree/train/cat/rgba.png')
    deep = g.read_image(Path('tree/train/cat/deep.png'), 64)
    assert deep.shape == (64, 64, 3) and abs(int(deep.mean()) - 127) <= 1
    assert len(np.unique(deep)) == 256
    assert len(g.read('tree', image_size=16)) == 11
    import shutil
    shutil.rmtree('tree/val/dog')
    with pytest.raises(g.UserError, match='dog'):
        g.read('tree', split='test')


def test_split_is_stratified_and_drawn_by_seed():
    labels = np.array([0] * 100 + [1] * 51 + [2] * 2 + [3])
    first, second = g.stratified_split(labels, 0.5, 0)
    assert sorted([*first, *second]) == list(range(154))
    assert [(labels[first] == k).sum() for k in range(4)] == [50, 26, 1, 1]
    assert not (np.diff(first) == 1).all()                              # not in file order
    assert (first != g.stratified_split(labels, 0.5, 1)[0]).any()
    assert (first == g.stratified_split(labels, 0.5, 0)[0]).all()
    assert (labels[g.stratified_split(labels, 0.9, 0)[0]] == 0).sum() == 90


def noise(n=40, size=8):
    g.write_noise('noise', n, 4, size, 0)
    return g.read('noise')


def test_batches_can_be_entered_anywhere_and_change_by_epoch(monkeypatch):
    data = noise()
    whole = list(g.Batches(data, range(40), 8, CPU, 'standard', 4, seed=1).epoch(2))
    rest = list(g.Batches(data, range(40), 8, CPU, 'standard', 4, seed=1).epoch(2, start=3))
    assert len(whole) == 5 and len(rest) == 2
    for (x, y), (x2, y2) in zip(whole[3:], rest):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    assert whole[0][0].is_contiguous(memory_format=torch.channels_last)
    other = next(g.Batches(data, range(40), 8, CPU, 'standard', 4, seed=1).epoch(3))
    assert not torch.equal(whole[0][0], other[0])
    monkeypatch.setattr(g, 'RESIDENT', 0)               # a large set: through a DataLoader
    data.on_device.clear()
    state = torch.get_rng_state()
    for workers in (0, 2):
        streamed = list(g.Batches(data, range(40), 8, CPU, 'standard', 4, 1, workers=workers)
                        .epoch(2))
        for (x, y), (x2, y2) in zip(whole, streamed):
            assert torch.equal(x, x2) and torch.equal(y, y2)
    assert torch.equal(state, torch.get_rng_state())    # a run that goes on draws the same


def test_evaluation_batches_hold_every_image_once():
    data = noise(37)
    batches = list(g.Batches(data, range(37), 8, CPU, shuffle=False).epoch())
    x = torch.cat([x for x, _ in batches])
    expected = (torch.from_numpy(np.array(data.images)).float() - 127.5) / 32
    assert torch.allclose(x.permute(0, 2, 3, 1), expected, atol=1e-4)
    assert torch.cat([y for _, y in batches]).tolist() == data.labels.tolist()


def test_augmentation():
    x = torch.arange(2 * 8 * 8 * 3, dtype=torch.uint8).view(2, 8, 8, 3)
    same = g.crop_and_flip(x, torch.tensor([[1, 1], [1, 1]]), torch.tensor([0, 1]), 1)
    assert torch.equal(same[0], x[0]) and torch.equal(same[1], x[1].flip(1))
    moved = g.crop_and_flip(x, torch.tensor([[0, 2], [1, 1]]), torch.tensor([0, 0]), 1)
    assert torch.equal(moved[0, 1:, :-1], x[0, :-1, 1:]) and not moved[0, 0].any()
    mask = g.square_mask(torch.tensor([[4, 4], [0, 0]]), 4, 8)
    assert mask.sum((1, 2)).tolist() == [64 - 16, 64 - 4]               # clipped at the corner
    assert g.square_mask(torch.tensor([[4, 4]]), 3, 8).sum() == 64 - 9
    assert g.square_mask(torch.tensor([[0, 0]]), 1, 8).sum() == 64 - 1
    data = noise()
    first = next(g.Batches(data, range(40), 8, CPU, 'auto', seed=1).epoch())[0]
    assert torch.equal(first, next(g.Batches(data, range(40), 8, CPU, 'none', seed=1).epoch())[0])
    data.kind = 'real'
    assert not torch.equal(first, next(g.Batches(data, range(40), 8, CPU, 'auto', seed=1)
                                       .epoch())[0])


def make(folder):
    try:
        g.write_noise(folder, 200, 10, 16, 0)
        return 'made'
    except g.UserError:
        return 'there'


def test_of_many_that_need_a_set_one_makes_it():
    with multiprocessing.get_context('fork').Pool(6) as pool:
        results = pool.map(make, ['same'] * 6)
    assert sorted(results) == ['made'] + ['there'] * 5
    assert len(g.read('same')) == 200 and sorted(p.name for p in Path('.').iterdir()) == ['same']


def test_what_a_killed_run_left_is_removed():
    Path('.noise.tmp123').mkdir()
    noise()
    assert sorted(p.name for p in Path('.').iterdir()) == ['noise']


def test_nothing_is_left_when_writing_fails():
    def broken():
        yield np.zeros((2, 8, 8, 3), np.uint8)
        raise OSError(28, 'No space left on device')
    meta = {'kind': 'noise', 'classes': ['a'], 'image_size': 8, 'num_images': 4, 'seed': 0}
    with pytest.raises(OSError):
        g.write_set('half', meta, np.zeros(4, np.int64), broken())
    assert list(Path('.').iterdir()) == []


def test_cifar_is_resized_when_asked():
    fake_cifar()
    data = g.read('cifar10', image_size=16)
    whole = g.read('cifar10')
    assert data.images.shape == (len(whole), 16, 16, 3) and data.images.dtype == np.uint8
    assert abs(data.images.mean() - whole.images.mean()) < 3
    g.write_random_labels('again', data, 0)
    assert np.array_equal(g.read('again').images, data.images)


def test_sets_of_other_sources_and_modes_have_folders_of_their_own(monkeypatch):
    import search
    fake_cifar()
    Path('other').mkdir()
    fake_cifar('other')
    path = Path('other/cifar-10-batches-py/data_batch_1')
    batch = pickle.loads(path.read_bytes())
    batch['data' if 'data' in batch else b'data'][0] = 7
    path.write_bytes(pickle.dumps(batch))
    for flags in (['--data', 'random_labels'], ['--data', 'random_labels', '--data_dir', 'other'],
                  ['--data', 'noise', '--num_images', '20'],
                  ['--data', 'noise', '--num_images', '20', '--label_mode', 'balanced']):
        g.find_or_make(search.parse(flags))
    names = [p.name for p in Path('data').iterdir() if p.name != 'cifar-10-batches-py']
    assert len(names) == 4


def test_folder_format_keeps_the_classes():
    g.write_noise('set', 40, 12, 8, 0, form='folder')
    folders = sorted(p.name for p in Path('set').iterdir() if p.is_dir())
    assert set(folders) <= {f'{k:02d}' for k in range(12)}
    data = g.read('set')
    labels = g.draw_labels(0, 40, 12)
    assert data.classes == [f'{k:02d}' for k in range(12)]
    assert sorted(data.labels) == sorted(labels)
    assert json.loads(Path('set/meta.json').read_text())['sha256']['images']


def test_a_written_folder_is_read_as_it_was_written():
    g.write_noise('set', 8, 2, 72, 0, form='folder')
    data, images = g.read('set'), g.noise_images(0, 0, 8, 72)
    assert data.kind == 'noise' and (data.mean, data.std) == ([0.5] * 3, [32 / 255] * 3)
    order = np.argsort(g.draw_labels(0, 8, 2), kind='stable')
    assert np.array_equal(data.images, images[order])       # neither cut nor resized
    next(Path('set').glob('*/*.png')).unlink()
    with pytest.raises(g.UserError, match='generate it again'):
        g.read('set')
    meta = {'kind': 'noise', 'classes': ['car', 'train'], 'image_size': 8, 'seed': 0}
    g.write_set('named', meta, np.arange(8) % 2, [images[:, :8, :8]], form='folder')
    assert g.read('named').classes == ['car', 'train'] and len(g.read('named')) == 8


def test_an_unfinished_download_leaves_nothing(monkeypatch):
    import torchvision

    def download(official, root, download):
        fake_cifar(root)
        (Path(root) / official.filename).write_bytes(b'archive')
        if not Path('works').exists():
            raise RuntimeError('the line is cut')

    monkeypatch.setattr(torchvision.datasets.CIFAR10, '__init__', download)
    with pytest.raises(g.UserError, match='the line is cut'):
        g.read('cifar10', download=True)
    assert not list(Path('data').iterdir())
    Path('works').touch()
    assert len(g.read('cifar10', download=True)) == 100
    assert [p.name for p in Path('data').iterdir()] == ['cifar-10-batches-py']
    assert not list(Path('data').rglob('*.tar.gz'))


def test_images_of_32_bits_and_turned_ones():
    wide = np.array([[0, 1 << 20], [1 << 19, 1 << 20]], np.int32)
    Image.fromarray(wide).save('wide.tif')
    assert g.read_image('wide.tif', 2)[:, :, 0].tolist() == [[0, 255], [128, 255]]
    turned = Image.fromarray(np.uint8([[[0] * 3, [255] * 3]] * 2))
    exif = turned.getexif()
    exif[274] = 3                                       # by half a turn
    turned.save('turned.png', exif=exif)
    assert g.read_image('turned.png', 2)[0, :, 0].tolist() == [255, 0]
    # A crop of a picture that lies on its side is that of the picture turned upright.
    across = np.arange(40 * 30 * 3).reshape(40, 30, 3).astype(np.uint8)
    upright = Image.fromarray(across)
    upright.save('upright.png')
    exif[274] = 6                                       # by a quarter
    upright.transpose(Image.ROTATE_90).save('side.png', exif=exif)
    for crop in (None, [0.3, 0.5, 0.2, 0.7]):
        assert np.array_equal(*(g.read_image(f'{name}.png', 16, 1, crop)
                                for name in ('upright', 'side')))


def test_a_class_name_of_two_lines_is_drawn():
    meta = {'kind': 'noise', 'num_images': 1, 'image_size': 8, 'classes': ['two\nlines'], 'seed': 0}
    assert g.contact_sheet(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, int), meta)
