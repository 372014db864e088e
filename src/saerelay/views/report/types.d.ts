// The shapes that the report's scripts pass around, for the type checker and for readers; no page loads
// this file. The data files' are as data.py writes them.

// --- data/labels.js: the words for names that occur in the other data files ----------------------

type Definition = [name: string, definition: string];

declare const labels: {
  metrics: Record<string, Definition>;
  methods: Record<string, string>;
  statuses: Record<string, string>;
  origins: Record<string, string>;
  roles: Record<string, string>;
  curves: Record<CurveName, Definition>;
};

// --- data files: data/<name>.js ------------------------------------------------------------------

/** What each data file holds, by its name. */
interface DataFiles {
  run: Run;
  /** Token ids of the test split, one list per sequence. */
  tokens: number[][];
  /** Texts of the token ids that occur anywhere. */
  vocabulary: Record<number, string>;
  /** Training logs by leg. */
  training: Record<string, TrainingLog>;
  matrix: Matrix;
  measures: Measures;
  interpretations: Interpretations;
  [list: `index/${string}`]: FeatureIndex;
  [chunk: `features/${string}`]: FeatureColumns;
  [link: `links/${number}`]: LinkColumns;
}

/** Facts of the run; loaded with the page. */
interface Run {
  model: string;
  /** The caption of every figure: model, data, tokens, dictionaries, L0, seed. */
  caption: string;
  /** Number of held-out tokens on which the SAEs' quality was measured. */
  n_tokens: number;
  metrics: Record<string, Definition>;
  /** Features in each file of data/features. */
  chunk: number;
  /** Activations in examples are whole numbers from 0 to this, relative to the feature's largest. */
  levels: number;
  legs: Leg[];
  /** What SAEs read and reconstruct, such as "mlp_out" or "transcoder", in the order of the plan. */
  kinds: string[];
  /** Ids of the legs of the suite, one per kind and layer, from the first layer to the last. */
  standing: string[];
  /** What became of features between two legs; the latents themselves are in data/links/<n>.js. */
  links: Link[];
  lineage: {
    n_tokens: number;
    map_tokens: number;
    kept_above: number;
    replaced_below: number;
    alive_above: number;
  };
  has: { matrix: boolean; measures: boolean; interpretations: boolean };
}

interface Leg {
  id: string;
  layer: number;
  kind: string;
  /** In words: its layer, and its kind and its number of active latents where the run has several. */
  place: string;
  role: "root" | "transfer" | "control";
  control_of: string | null;
  control_kind: string | null;
  parent: string | null;
  method: string | null;
  n_latents: number;
  fvu: number;
  l0: number;
  features: FeatureFacts;
}

/** How a leg's features were collected. */
interface FeatureFacts {
  n_tokens: number;
  /** Tokens of an example before and after the one of the largest activation. */
  window_before: number;
  window_after: number;
  /** Histograms count in half octaves from 2 to the power of this. */
  histogram_first_edge: number;
  /** Ids of the legs at the next and at the previous layer. */
  above: string | null;
  below: string | null;
}

/** k: kept, d: drifted, r: replaced, x: died, b: born, "-": silent at both ends. */
type Status = "k" | "d" | "r" | "x" | "b" | "-";

/** Two legs whose latents were compared. */
interface Link {
  kind: "depth" | "hop" | "control";
  source: string;
  target: string;
  /** "index": latents keep their number; "assignment": they were matched one to one. */
  by: "index" | "assignment";
  counts: Record<Status, number>;
}

/** A link latent by latent of its source; cosines and correlation in thousandths. */
interface LinkColumns {
  status: string;
  /** Each latent's partner in the target, or -1; null where latents keep their number. */
  partner: number[] | null;
  decoder_cosine: (number | null)[];
  encoder_cosine: (number | null)[];
  correlation: (number | null)[];
}

/** What the list of features needs of a leg's, latent by latent. */
interface FeatureIndex {
  fired: number[];
  max: number[];
  /** Token ids at the peaks of the strongest examples. */
  peaks: number[][];
  /** Ids of the tokens that the latent promotes most, if that was computed. */
  top?: number[][];
}

/** What the pages of some features need, latent by latent. */
interface FeatureColumns {
  fired: number[];
  max: number[];
  mean: number[];
  /** [first bin, count, count, …], or empty. */
  histogram: number[][];
  /** Of each latent its examples, strongest first: [sequence, position, offset, level, offset, level, …]. */
  examples: number[][][];
  /** Promoted and suppressed tokens: [id, change of its logit, id, …]. */
  top?: number[][];
  bottom?: number[][];
  /** Most similar latents of the next and previous layer: [latent, thousandths of a cosine, latent, …]. */
  above?: number[][];
  below?: number[][];
}

type CurveName = "fvu" | "loss" | "l0" | "n_dead" | "learning_rate";

/** Columns of a leg's training log; age counts the tokens that the leg has been trained on. */
type TrainingLog = Record<CurveName, (number | null)[]> & { age: number[] };

/** matrix.json */
interface Matrix {
  layers: number[];
  n_tokens: number;
  map_tokens: number;
  cells: MatrixCell[];
}

/** One SAE on one layer's activations; the metrics of run.metrics stand in it by name. */
interface MatrixCell {
  leg: string;
  tokens: number;
  snapshot: boolean;
  source: number;
  target: number;
  method: string;
  [metric: string]: unknown;
}

/** measures.json */
interface Measures {
  similarity: SimilarityRow[];
  transferability: TransferabilityRow[] | null;
  transfer_scores: TransferScoreRow[] | null;
  offsets: OffsetRow[] | null;
  dla: { n_prompts: number; legs: AttributionRow[] } | null;
}

/** A row about a leg, or about a snapshot of it. */
interface MeasuresRow {
  leg: string;
  layer: number;
  snapshot: boolean;
}
interface SimilarityRow {
  kind: "suite" | "hop" | "scratch";
  snapshot: boolean;
  source: string;
  target: string;
  mmcs: number | null;
  mmcs_folded: number | null;
}
interface TransferabilityRow extends MeasuresRow {
  parent: string;
  n_latents: number;
  top_logits: number | null;
  bottom_logits: number | null;
  top_tokens: number | null;
  transferability: number | null;
}
interface TransferScoreRow extends MeasuresRow {
  parent: string;
  scratch: string;
  method: string;
  fvu: number | null;
  ce_loss_score: number | null;
}
interface OffsetRow {
  /** "" in documents of old versions. */
  kind: string;
  metric: string;
  method: string;
  /** The snapshots' age; null for finished SAEs. */
  tokens: number | null;
  offset: number;
  mean: number;
}
interface AttributionRow extends MeasuresRow {
  mean: number | null;
  standard_error: number | null;
}

interface Interpretations {
  legs: InterpretedLeg[];
  origins: InterpretedOrigin[];
  /** By leg and latent. */
  latents: Record<string, Record<string, Explanation>>;
}
type Explanation = [text: string, detection: number | null, fuzzing: number | null];
interface Score {
  mean: number | null;
  standard_error: number | null;
}
interface InterpretedOrigin {
  origin: string;
  n_legs: number;
  n_explained: number;
  detection: Score;
  fuzzing: Score;
}
interface InterpretedLeg {
  leg: string;
  layer: number;
  origin: string;
  asked: { model: string };
  n_explained: number;
  n_failed: number;
  n_rare: number;
  detection: Score;
  fuzzing: Score;
}

// --- elements and views --------------------------------------------------------------------------

type AttributeValue = string | number | boolean | null | undefined | ((event: any) => void);
type Attributes = Record<string, AttributeValue>;
type Child = Node | string | null | undefined | Child[];
/** What an element is made of: its attributes, if it has any, and its children. */
type Parts = [Attributes, ...Child[]] | Child[];

/** Draws one section into `body`; parts and query are those of the address. */
type View = (body: HTMLElement, parts: string[], query: URLSearchParams) => Promise<void>;

interface Column<Row> {
  name: keyof Row;
  heading: string;
  /** Writes a number; columns without it are text. */
  format?: (value: any) => string;
}

// --- features ------------------------------------------------------------------------------------

/** A feature, from its chunk. */
interface Feature {
  leg: Leg;
  latent: number;
  fired: number;
  max: number;
  mean: number;
  histogram: number[];
  examples: number[][];
  top: [id: number, logit: number][] | null;
  bottom: [id: number, logit: number][] | null;
  above: [latent: number, cosine: number][] | null;
  below: [latent: number, cosine: number][] | null;
}

/** Positions are those of the sequence; start and end are the first and the last of the window. */
interface Example {
  sequence: number;
  position: number;
  start: number;
  end: number;
  levels: Map<number, number>;
}

/** A step along a link: the latent it leads to, and what became of the one it comes from. */
interface Step {
  latent: number | null;
  status: Status;
  decoder: number | null;
  encoder: number | null;
  correlation: number | null;
}

/** A feature in one layer of the suite, and its step to the next. */
interface Stop {
  leg: string;
  latent: number | null;
  step: Step | null;
}

/** A feature in the list. */
interface ListedFeature {
  leg: Leg;
  latent: number;
  fired: number;
  density: number;
  max: number;
  peaks: number[];
  top: number[];
  status: Status | undefined;
  cosine: number | null;
  /** How well it matches the search. */
  score: number;
}

interface ListChoice {
  leg: string;
  q: string;
  density: string;
  status: string;
  sort: string;
}

interface FeatureOrder {
  text: string;
  compare: (a: ListedFeature, b: ListedFeature) => number;
}

interface TokenSearch {
  exact: Set<number>;
  containing: Set<number>;
  latent: number | null;
  isEmpty: boolean;
}

/** A row of the lineage's list. */
interface BandRow {
  source: string;
  target: string;
  link: LinkColumns;
  latent: number;
  partner: number;
  tokenTexts: string[];
  trace: (latent: number, button: HTMLElement) => void;
}

// --- drawings ------------------------------------------------------------------------------------

interface HeatMap<Name> {
  rows: Name[];
  columns: Name[];
  corner: string;
  digits: number;
  rowName: (row: Name) => string;
  columnName: (column: Name) => string;
  value: (row: Name, column: Name) => unknown;
  tooltip: (row: Name, column: Name, value: number) => string;
}

interface HeatScale {
  low: number;
  high: number;
  logarithmic: boolean;
  percentOfRange: (value: number) => number;
}

interface Line {
  id: string;
  name: string;
  colour: string;
  dashed: boolean;
  points: [x: number, y: number][];
}

interface LineChart {
  lines: Line[];
  xLabel: string;
  yLabel: string;
  logarithmic: boolean;
  /** The drawing's description, for screen readers. */
  label: string;
}

/** A chart's size, the ends of its axes in drawing units, their ranges, and where values lie. */
interface ChartFrame {
  width: number;
  height: number;
  left: number;
  right: number;
  top: number;
  bottom: number;
  xRange: { low: number; high: number };
  yRange: { low: number; high: number };
  x: (value: number) => number;
  y: (value: number) => number;
}

interface FlowLayout {
  legs: string[];
  /** Between each two neighbours, how many features had each status. */
  counts: Record<Status, number>[];
  /** Alive features of each layer. */
  alive: number[];
  /** Height of one feature. */
  scale: number;
  width: number;
  height: number;
}

interface Flow {
  svg: SVGElement;
  /** Chooses the first band of features that changed, if there is one. */
  chooseFirstChange: (() => void) | null;
  /** Draws one feature's path. */
  trace: (stops: Stop[]) => void;
}
