"""What all scripts share."""

MPS_FALLBACK = "PYTORCH_ENABLE_MPS_FALLBACK"
