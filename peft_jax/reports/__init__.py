"""Reports: pages that stand for themselves, made from what runs left in their folders."""
