// The shapes that the judging page's script passes around, for the type checker and for readers; no page
// loads this file.

/** What the page's element #data holds, as saerelay.views.judge writes it. */
interface JudgingData {
  /** The page's name, a hash of what is on it. */
  page: string;
  /** Activations are whole numbers up to this, relative to the feature's largest. */
  levels: number;
  /** Texts of tokens; elsewhere tokens are numbers into these. */
  texts: string[];
  items: JudgedItem[];
}

interface JudgedItem {
  examples: JudgedExample[];
  /** Tokens that the feature promotes and suppresses most; values relative to the largest of them. */
  top?: [token: number, value: number][];
  bottom?: [token: number, value: number][];
}

interface JudgedExample {
  tokens: number[];
  /** A level for each token; -1 where activations are not known. */
  levels: number[];
  /** Which token fires most. */
  peak: number;
}

type Answer = "yes" | "no" | "skip";

interface JudgingState {
  page: string;
  judge: string;
  /** The current screen: 0 is the introduction, 1 to N are items, N + 1 is the end. */
  at: number;
  /** By item. */
  answers: Record<number, Answer>;
  /** The items with an answer, in the order in which they got it. */
  given: number[];
}
