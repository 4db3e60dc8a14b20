"""Data sets: where examples come from, how they are ordered, and how they are changed on the device.

Begin with `datasets`, the kinds that a config can hold, and `image_set`, what each of them ends in. `sources` reads them,
`cache` decodes image files once into a memory map (`image_files`, `decoding`, `tfds_builders`); `shuffle` orders, `prefetch`
brings to the devices, `augmentation` changes at random. A new data set is a `Dataset` in `datasets`, with a name in `CHOICES`
of `config`; one of published files an `ImageBuilder` in `tfds_builders`, with their sizes and hashes, and an entry of
`BUILDERS` there.

Published sets, of which `bsvae train CONFIG --data tfds --data.name NAME` prepares those of the first three rows by itself:

    mnist, fashion_mnist, cifar10    bsvae prepare cifar10: they are downloaded
    celeb_a                          bsvae prepare celeb_a --manual-dir FOLDER --crop 148 --size 64: FOLDER holds
                                     img_align_celeba.zip or its folder, list_eval_partition.txt and list_attr_celeba.txt,
                                     which are handed to people only
    lsun/church_outdoor, ...         bsvae prepare lsun/church_outdoor --size 64 --test-split validation: needs the
                                     extra `lsun`; downloaded, or in --manual-dir as published, unpacked or exported
    any other image set of TFDS      bsvae prepare kmnist: needs the extra `tf`, for this command only

What is downloaded, or found in a manual directory, must have the published size and SHA-256; archives are read, never unpacked
over other files.

Your own images: `Folder` takes a folder, a .zip or a .tar (which is read through at each start; a .tar.gz is decompressed for
it), `Arrays` a .npz, a .npy, or a folder of memory maps that `prepare` writes of any iterable: a generator, a loader of another
library, images of 16 bits. A line says how they were divided, and what was left out. Where some are gray, `--data.channels 3`
(or 1) makes them alike. Bits per dimension depend on the number of gray levels: 256 of uint8, else `--data.levels` (guessed,
and said, where floats lie on a grid; asked for where they do not). Images of more than 179 million pixels need
`BSVAE_MAX_PIXELS`, PNGs with more than a mebibyte of text `BSVAE_MAX_TEXT`.

Where a set has labels, one class for each image, `bsvae train CONFIG --classes 10` tells them to encoder and decoder: then
`bsvae sample RUN --labels 0 1 2` draws of these classes.

A set that fits into half of a device's memory (`--resident-memory 0.5`) lies there; a larger one is streamed with the next
batches on their way, in the same order. That order depends on seed and epoch alone: every image once an epoch, on any number
of devices.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
