"""LongVideoGAN; the source text inside older pickles, which --trust runs, imports these two modules from here."""

from torch_utils import compilation as compilation
from torch_utils import precision as precision
