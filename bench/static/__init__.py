"""What a kernel costs, read from its machine code and its interpreted run: no GPU needed (`tileformer bench static`)."""
