// Written by kernel/declared.py from the declarations in src/cellstack/cells: change those instead.
#pragma once
#include "cfc.h"
#include "cfs.h"
#include "gru.h"
#include "ligru.h"
#include "lstm.h"
#include "mingru.h"
#include "minlstm.h"
#include "rnn.h"
#include "slstm.h"
#include "sru.h"
