"""Several processes, called ranks, at one training: who they are, what they tell each other, what happens where one
fails. torch.distributed does the communication; nothing here knows of models.
"""
