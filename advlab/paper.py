"""The paper's published numbers, and the comparison of ours with them."""

# Training eps of Tables 1 and 2 (0: the baseline), and the CNN's sweep (findings.md, section 2:
# seven of the paper's eight values can be identified; 0.1 stands for the eighth).
TABLE_TRAIN_EPS = (0.0, 0.005, 0.01, 0.015, 0.2)
SWEEP_TRAIN_EPS = (0.0, 0.005, 0.007, 0.01, 0.015, 0.1, 0.2, 0.3, 0.5)
