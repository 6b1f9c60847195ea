"""What a kernel costs, read from its machine code and its interpreted run without a GPU (`tileformer bench static`)."""
