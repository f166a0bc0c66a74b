"""The emoji family: data, codec, text encoder, teacher, finetune, pack and the classifier that measures them."""
