"""Operations on plain tensors, each with its definition in PyTorch. Needs torch alone."""
