"""`python -m train`, for recipes of the emoji family that set loss.classifier, and for fits to its checkpoints.

python -m train.emoji train/configs/emoji-m2.toml --set loss.classifier=models/emoji --set loss.perceptual=0.1
python -m train.emoji fit CHECKPOINT PACK OUT --prompts prompts.txt --size 128
"""

from ..__main__ import main
from .features import ClassifierFeatures
from .text import encoder_beside

if __name__ == "__main__":
    main(ClassifierFeatures, encoder_beside)
