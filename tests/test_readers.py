"""Readers of CIFAR, folders, ImageNet and CheXpert, and how their images are augmented."""
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (COLUMNS, chexpert, fake_cifar, folder_of_images, imagenet, one_line,
                      python2_pickle)
from PIL import Image
from torchvision.transforms import RandomResizedCrop

import generate_data as g

CPU = torch.device('cpu')


def test_cifar_is_read_as_python_2_wrote_it(capsys):
    folder = fake_cifar()
    data = np.random.default_rng(1).integers(0, 256, (7, 3072), np.uint8)
    (folder / 'data_batch_1').write_bytes(python2_pickle({'data': data, 'labels': [*range(7)]}))
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
        Path('data/cifar-100-python', name).write_bytes(python2_pickle(content))
    assert g.read('cifar100', {}).labels.tolist() == [99] * 7


class Runs:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize('data', [
    Runs(os.system, ('touch evil',)), Runs(open, ('evil', 'w')), Runs(memoryview, (b'x' * 3072,))])
def test_a_crafted_pickle_is_one_line_and_is_not_run(data, capsys):
    (fake_cifar() / 'data_batch_2').write_bytes(pickle.dumps({'data': data, 'labels': [0]}))
    one_line(capsys, g.main(['--kind', 'random_labels', '--out', 'x']), 'data_batch_2')
    assert not Path('evil').exists()


def test_image_folders_of_any_depth_of_colour_and_turned_images():
    folder_of_images('tree/train')
    folder_of_images('tree/val', n=2)
    train, test = (g.read('tree', {'image_size': 8}, split) for split in ('train', 'test'))
    assert (len(train), len(test)) == (8, 4) and train.images.shape[1:] == (8, 8, 3)
    assert train.mean == test.mean
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save('tree/train/cat/deep.png')           # 16 bits, grey
    Image.fromarray((ramp // 256).astype(np.uint8)).save('tree/train/cat/grey.jpg')
    Image.fromarray(np.zeros((9, 9, 4), np.uint8)).save('tree/train/cat/rgba.png')
    deep = g.read_image('tree/train/cat/deep.png', 64)
    assert len(np.unique(deep)) == 256 and len(g.read('tree', {'image_size': 16})) == 11
    upright = Image.fromarray(np.arange(40 * 30 * 3).reshape(40, 30, 3).astype(np.uint8))
    upright.save('upright.png')
    exif = upright.getexif()
    exif[274] = 6                                       # lies on its side, by a quarter of a turn
    upright.transpose(Image.ROTATE_90).save('side.png', exif=exif)
    assert (g.read_image('side.png', 16) == g.read_image('upright.png', 16)).all()


@pytest.mark.parametrize('name, needle', [
    ('eps', 'cannot identify'), ('bomb', 'pixels'), ('cut', 'truncated')])
def test_a_hostile_image_is_one_line(name, needle, capsys):
    folder_of_images('own')
    path = Path('own/cat/0.png')
    if name == 'bomb':
        Image.new('1', (14000, 14000)).save(path)
    else:
        eps = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(evil) (w) file\n'
        path.write_bytes(eps if name == 'eps' else path.read_bytes()[:50])
    one_line(capsys, g.main(['--kind', 'random_labels', '--source', 'own', '--out', 'x']), '0.png')
    with pytest.raises(g.UserError, match=needle):
        g.read_image(path, 8)


def test_imagenet_tree_is_read_as_it_lies_on_disk():
    imagenet('in')
    red = Image.new('RGB', (90, 90), (200, 10, 10))
    red.convert('CMYK').save('in/val/n01/cmyk.JPEG', 'JPEG')
    red.save('in/val/n01/disguised.JPEG', 'PNG')
    red.convert('L').save('in/val/n01/grey.JPEG', 'JPEG')
    where = {'data_dir': 'in', 'image_size': 64}
    train, test = (g.read('imagenet', where, split) for split in ('train', 'test'))
    assert train.classes == ['n01', 'n02', 'n03'] and len(train) == 24 and len(test) == 9
    assert train.mean == [0.485, 0.456, 0.406]
    assert not g.read('imagenet', {'data_dir': 'in'}).resident
    cmyk, disguised, grey = test.get(range(2, 5)).astype(int)
    assert abs(cmyk - (200, 10, 10)).max() < 12 and (disguised == (200, 10, 10)).all()
    assert (grey == grey[0, 0, 0]).all()
    Path('in/train/n02/3.JPEG').write_bytes(b'not an image')
    with pytest.raises(g.UserError, match='3.JPEG'):
        g.read('imagenet', where)
    with pytest.raises(g.UserError, match='nowhere/imagenet/train'):
        g.read('imagenet', {'data_dir': 'nowhere'})


def test_crops_are_those_of_random_resized_crop():
    """The crop of torchvision from a ramp: its middle tells where it lies, its range how large."""
    ramp = np.zeros((400, 600, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 600), np.linspace(0, 255, 400)[:, None]
    Image.fromarray(ramp).save('ramp.png')
    for seed in range(30):
        torch.manual_seed(seed)
        x = g.read_image('ramp.png', 16, 8 / 7, crop=True).astype(int)
        torch.manual_seed(seed)
        top, left, height, width = RandomResizedCrop.get_params(
            torch.zeros(1, 400, 600), (0.08, 1), (3 / 4, 4 / 3))
        for channel, start, length, side in ((0, left, width, 600), (1, top, height, 400)):
            assert abs(x[..., channel].mean() / 255 - (start + length / 2) / side) < 0.01
            assert abs(np.ptp(x[..., channel]) / 255 - length / side) < 0.1


def test_augmentations_keep_what_they_should():
    pixels = np.zeros((6, 72, 72, 3), np.uint8)
    pixels[:, :, :36] = 255                                         # left half white
    data = g.Data('x', 'real', pixels, np.zeros((6, 14), np.uint8), list(g.CHEXPERT), [.5] * 3,
                  [.2] * 3, 72)
    sides = {}
    for augment in ('affine', 'crop'):
        batches = g.Batches(data, range(6), 6, CPU, augment, workers=0)
        x = torch.cat([next(batches.epoch(k))[0] for k in range(4)])
        sides[augment] = x[:, 0, :, 10:26].mean((1, 2)) > x[:, 0, :, 46:62].mean((1, 2))
        assert (x.std(0) > 0).any()
    assert sides['affine'].all() and 3 < sides['crop'].sum() < 21


@pytest.mark.parametrize('layout, prefix, inside', [
    ('CheXpert-v1.0-small', None, ''), ('CheXpert-v1.0', 'CheXpert-v1.0-small', ''),
    ('CheXpert-v1.0', '/mnt/other/CheXpert-v1.0', 'CheXpert-v1.0')])
def test_chexpert_layouts(layout, prefix, inside):
    chexpert('d', layout, prefix, columns=COLUMNS[::-1])
    where = {'data_dir': str(Path('d', inside)), 'image_size': 16}
    train, valid = (g.read('chexpert', where, split) for split in ('train', 'test'))
    assert len(train) == 12 and len(valid) == 6 and train.classes == list(g.CHEXPERT)
    assert train.images.shape == (12, 16, 16, 3) and train.studies[3] == 'patient00003/study1'
    assert len(g.read('chexpert', {**where, 'views': 'all'})) == 24
    assert (train.mean, train.std) == (valid.mean, valid.std)
    assert len({g.find_or_make('random_labels', {
        **g.DEFAULTS, **where, 'data_seed': 0, 'source': 'chexpert', 'uncertain': policy}).name
        for policy in ('ones', 'zeros')}) == 2


def test_uncertain_labels():
    chexpert('d')
    names, cells = list(g.CHEXPERT), np.arange(12)
    for policy, *wanted in (('mixed', 0, 1), ('ones', 1, 1), ('zeros', 0, 0), ('ignore', -1, -1)):
        s = {'data_dir': 'd', 'image_size': 16, 'uncertain': policy}
        for name, value in zip(('Pneumonia', 'Atelectasis'), wanted):
            k = names.index(name)
            wanted_by_cell = np.array([0, 1, 0, value])[(cells + k) % 4]
            assert (g.read('chexpert', s).labels[:, k] == wanted_by_cell).all()


def test_chexpert_that_is_damaged_is_one_line():
    def refused():
        with pytest.raises(g.UserError) as error:
            g.read('chexpert', {'data_dir': 'd', 'image_size': 16})
        return str(error.value)

    assert 'train.csv' in refused()
    chexpert('d')
    table = Path('d/CheXpert-v1.0-small/train.csv')
    whole = table.read_text()
    for text, needle in ((whole.replace('Edema', 'Oedema'), 'Edema'),
                         (whole.replace('-1.0', '-2.0', 1), '-2.0'),
                         (','.join(whole.split(',')[:-3]), 'no cell'),     # cut in its last line
                         (whole.splitlines()[0] + '\n', 'no rows'),
                         (whole.replace('patient0000', 'patient9990'), 'patient99900'),
                         ('\0\0', 'CSV')):
        table.write_text(text)
        assert needle in refused()


def test_pictures_without_val_hold_out_the_same_share_of_each_class():
    folder_of_images('own', n=8)
    train, test = (g.read('own', {'image_size': 8}, split) for split in ('train', 'test'))
    assert np.bincount(train.labels).tolist() == [7, 7]
    assert np.bincount(test.labels).tolist() == [1, 1] and test.mean == train.mean
    both = {image.tobytes() for image in (*train.images, *test.images)}
    assert len(both) == 16                              # no picture is in both
    again = g.read('own', {'image_size': 8}, 'test')
    assert np.array_equal(again.images, test.images)
    whole = {'image_size': 8, 'test_fraction': 0.0}
    assert len(g.read('own', whole)) == 16 and g.read('own', whole, 'test') is None


def test_pictures_that_cannot_be_read_are_named_at_once_or_skipped(capsys):
    for split in ('train', 'val'):
        folder_of_images(f'own/{split}')
        for name in ('one', 'two'):
            Path(f'own/{split}/cat/{name}.jpg').write_bytes(b'no picture')
    Path('own/train/cat/notes.txt').touch()
    with pytest.raises(g.UserError, match='4 pictures cannot be read: .*one.jpg, .*val.*one.jpg'):
        g.read('own', {})
    assert len(g.read('own', {'skip_broken': True})) == 8
    assert len(g.read('own', {'skip_broken': True}, 'test')) == 8
    assert 'no pictures are left out: 1 .txt' in capsys.readouterr().err
