"""ImageNet and CheXpert on disk: layouts, labels, and how their images are augmented."""
import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import folder_of_images, settings
from torchvision.transforms import RandomResizedCrop

import generate_data as g

CPU = torch.device('cpu')


def refused(name, **s):
    """What the reader says of data that it does not take."""
    with pytest.raises(g.UserError) as error:
        data = g.read(name, {'image_size': 16, **s})
        data.get(range(len(data)))
    return str(error.value)


def tree(root):
    """ImageNet's layout: three classes of 8 and 2 images."""
    for split, n in (('train', 8), ('val', 2)):
        folder_of_images(Path(root, split), ('n01', 'n02', 'n03'), n, (80, 72), 'JPEG')


def test_imagenet_tree_is_read_as_it_lies_on_disk():
    tree('in')
    red = Image.new('RGB', (90, 90), (200, 10, 10))
    red.convert('CMYK').save('in/val/n01/cmyk.JPEG', 'JPEG')
    red.save('in/val/n01/disguised.JPEG', 'PNG')
    red.convert('L').save('in/val/n01/grey.JPEG', 'JPEG')
    where = {'data_dir': 'in', 'image_size': 64}
    train, test = (g.read('imagenet', where, split) for split in ('train', 'test'))
    assert train.classes == ['n01', 'n02', 'n03'] and len(train) == 24 and len(test) == 9
    assert train.mean == [0.485, 0.456, 0.406]
    assert g.read('imagenet', {'data_dir': 'in'}).images is None
    cmyk, disguised, grey = test.get(range(2, 5)).astype(int)
    assert abs(cmyk - (200, 10, 10)).max() < 12 and (disguised == (200, 10, 10)).all()
    assert (grey == grey[0, 0, 0]).all()
    Path('in/train/n02/3.JPEG').write_bytes(b'not an image')
    assert '3.JPEG' in refused('imagenet', data_dir='in')
    assert 'nowhere/imagenet/train' in refused('imagenet', data_dir='nowhere')


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


# ---------------------------------------------------------------------------------------------
# CheXpert

COLUMNS = ['Path', 'Sex', 'Age', 'Frontal/Lateral', 'AP/PA', *g.CHEXPERT]


def write_rows(path, rows, columns=COLUMNS):
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def chest(root, layout='CheXpert-v1.0-small', prefix=None, patients=12, columns=COLUMNS):
    """Patients with a frontal and a lateral view; every label now and then, -1.0 made up."""
    rng, splits = np.random.default_rng(0), {'train': [], 'valid': []}
    for p in range(patients + 6):
        split = 'train' if p < patients else 'valid'
        study = f'patient{p:05d}/study1'
        folder = Path(root, layout, split, study)
        folder.mkdir(parents=True)
        cells = {name: ['', '1.0', '0.0', '-1.0' if split == 'train' else '1.0'][(p + k) % 4]
                 for k, name in enumerate(g.CHEXPERT)}
        cells['Fracture'] = ''
        for view in ('view1_frontal', 'view2_lateral'):
            pixels = rng.integers(0, 256, (6, 5), np.uint8)
            Image.fromarray(pixels).resize((20, 24)).save(folder / f'{view}.jpg')
            splits[split].append({
                'Path': f'{prefix or layout}/{split}/{study}/{view}.jpg', 'Sex': 'Male', 'Age': 5,
                'Frontal/Lateral': view[6:].title(), 'AP/PA': 'PA', **cells})
    for split, rows in splits.items():
        write_rows(Path(root, layout, f'{split}.csv'), rows, columns)
    return root


@pytest.mark.parametrize('layout, prefix, inside', [
    ('CheXpert-v1.0-small', None, ''), ('CheXpert-v1.0', 'CheXpert-v1.0-small', ''),
    ('CheXpert-v1.0', '/mnt/other/CheXpert-v1.0', 'CheXpert-v1.0')])
def test_chexpert_layouts(layout, prefix, inside):
    chest('d', layout, prefix, columns=COLUMNS[::-1])
    where = {'data_dir': str(Path('d', inside)), 'image_size': 16}
    train, valid = (g.read('chexpert', where, split) for split in ('train', 'test'))
    assert len(train) == 12 and len(valid) == 6 and train.classes == list(g.CHEXPERT)
    assert train.images.shape == (12, 16, 16, 3) and train.studies[3] == 'patient00003/study1'
    assert len(g.read('chexpert', {**where, 'views': 'all'})) == 24
    assert (train.mean, train.std) == (valid.mean, valid.std)
    names = {g.find_or_make('random_labels', settings(
        **where, source='chexpert', uncertain=policy, label_mode='permute')).name
        for policy in ('ones', 'zeros')}
    assert len(names) == 2


@pytest.mark.parametrize('policy, other, atelectasis', [
    ('mixed', 0, 1), ('ones', 1, 1), ('zeros', 0, 0), ('ignore', -1, -1)])
def test_uncertain_labels(policy, other, atelectasis):
    chest('d')
    labels = g.read('chexpert', {'data_dir': 'd', 'image_size': 16, 'uncertain': policy}).labels
    names = list(g.CHEXPERT)
    for k, expected in ((names.index('Pneumonia'), other),
                        (names.index('Atelectasis'), atelectasis)):
        cells = np.array([(p + k) % 4 for p in range(12)])
        assert (labels[cells == 3, k] == expected).all()
        assert (labels[cells == 1, k] == 1).all() and (labels[cells % 2 == 0, k] == 0).all()


def test_chexpert_that_is_damaged_is_one_line():
    def run():
        return refused('chexpert', data_dir='d')
    assert 'train.csv' in run()
    chest('d')
    table = Path('d/CheXpert-v1.0-small/train.csv')
    whole = table.read_text()
    for text, needle in ((whole.replace('Edema', 'Oedema'), 'Edema'),
                         (whole.replace('-1.0', '-2.0', 1), '-2.0'),
                         (','.join(whole.split(',')[:-3]), 'no cell'),     # cut in its last line
                         (whole.splitlines()[0] + '\n', 'no rows'),
                         (whole.replace('patient0000', 'patient9990'), 'patient99900')):
        table.write_text(text)
        assert needle in run()
    table.write_bytes(b'\xff\xfe\x00')
    assert 'CSV' in run()
    table.write_text(whole)
    lost = Path('d/CheXpert-v1.0-small/train/patient00007/study1/view1_frontal.jpg')
    lost.rename('d/kept.jpg')
    assert 'patient00007' in run()


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
