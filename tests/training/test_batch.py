"""Which images of a batch count, and which are right."""

import torch

from auglocal_ext.training.batch import counted, right_answers

LOGITS = torch.eye(4)[[0, 1, 2, 3, 3]]  # the answers are 0, 1, 2, 3, 3


def test_right_answers_and_how_many_they_are_out_of():
    labels = torch.tensor([0, 1, 0, 3, -100])
    assert right_answers(LOGITS, labels, -100) == 3 and counted(labels, -100) == 4
    assert right_answers(LOGITS, labels, 3) == 2 and counted(labels, 3) == 4  # an ignored class is never right
    assert right_answers(LOGITS, labels, None) == 3 and counted(labels, None) == 5


def test_of_soft_labels_the_largest_share_is_right():
    labels = torch.tensor([[0.6, 0.4, 0, 0], [0.6, 0.4, 0, 0], [0, 0, 1, 0], [0.3, 0, 0.3, 0.4], [0, 0, 0.9, 0.1]])
    assert right_answers(LOGITS, labels, -100) == 3 and counted(labels, -100) == 5
