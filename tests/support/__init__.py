"""What several test files share: real checkpoints, and independent readers to compare with."""
