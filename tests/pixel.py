"""A replacement for drawing with matplotlib, for tests that do not look at the picture."""

PIXEL = bytes.fromhex(   # a PNG of one pixel
    '89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55'
    '0000000a49444154789c636000000002000148afa4710000000049454e44ae426082')


def write_pixel(figure, path, **settings):
    """Write one pixel in place of Figure.savefig, which takes a tenth of a second."""
    with open(path, 'wb') as f:
        f.write(PIXEL)
