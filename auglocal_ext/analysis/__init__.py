"""What a trained model's units have learnt: how alike their features are (CKA), and what a linear probe reads there.

alike = auglocal_ext.analysis.cka(local, backpropagated, loader)
alike.matrix, alike.rows, alike.columns
for unit, accuracy in auglocal_ext.analysis.probe(local, train_loader, test_loader):
    print(unit, accuracy)
"""

from .cka import CKA, cka
from .probes import probe

__all__ = ["CKA", "cka", "probe"]
